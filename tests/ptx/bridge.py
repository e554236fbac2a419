"""Launches of `simsid.kernels` as PTX: compiled by Triton for an architecture, run by the interpreter on the CPU.

The host code, its plans, the custom ops and autograd run as they are; only the last step, the launch, is replaced.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from compiled import Variant, specialize  # noqa: E402
from ptx.global_memory import GlobalMemory  # noqa: E402
from ptx.instructions import parse  # noqa: E402
from ptx.machine import Machine, run  # noqa: E402
from ptx.shared_memory import SharedMemory  # noqa: E402
from ptx.tensorcore import ROUNDING, Rounding  # noqa: E402
from ptx.translate import Kernel, translate  # noqa: E402

from simsid.kernels import backend  # noqa: E402
from simsid.kernels.handles import Handles  # noqa: E402
from simsid.kernels.launch import Launch, launches_by  # noqa: E402

THREADS = 4096  # that run in step: more make each step longer, fewer make more steps


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What Triton made of a kernel."""

    ptx: str
    shared: int  # bytes
    num_warps: int


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A launch, ready to run: the PTX of its kernel, and everything that it is given."""

    kernel: str
    ptx: str
    grid: tuple[int, ...]
    threads: int  # of a block
    shared: int  # bytes of a block
    storages: list[np.ndarray]  # bytes of the tensors
    arguments: list[np.ndarray]  # of one element each; pointers are addresses in a `GlobalMemory` of the storages

    def run(self, rounding: Rounding | None) -> tuple[GlobalMemory, int]:
        """Run every block, some at a time.

        Args:
            rounding: of the tensor cores.

        Returns:
            The memory afterwards, and how many instructions left it to the GPU which of a warp's values stays (see
            `SharedMemory.ambiguous`).
        """
        kernel, memory, ambiguous = _translated(self.ptx), GlobalMemory(self.storages), 0
        x, y, z = (*self.grid, 1, 1)[:3]
        together = max(1, THREADS // self.threads)
        # Triton adds pointers to scratch memory, which these kernels do not use: null, so that a use is a fault.
        scratch = [np.zeros(1, np.uint64)] * (len(kernel.parameters) - len(self.arguments))
        parameters = dict(zip((name for _, name in kernel.parameters), [*self.arguments, *scratch]))
        for first in range(0, x * y * z, together):
            numbers = np.arange(first, min(first + together, x * y * z))
            machine = Machine(kernel, numbers, (x, y, z), self.threads)
            machine.parameters, machine.global_memory, machine.rounding = parameters, memory, rounding
            machine.shared = SharedMemory(self.shared, kernel.granule, len(numbers), self.threads)
            run(kernel, machine)
            ambiguous += machine.shared.ambiguous[0]
        return memory, ambiguous


def _stop_at_ptx(*arguments: object) -> tuple[str, str] | None:
    """Replace the last stage of the compiler, ptxas, by an empty file; without arguments, return the cache's key."""
    if not arguments:
        return "ptx only", "ptx only"
    stages = arguments[1]
    stages["cubin"] = lambda module, metadata: b""
    return None


@contextlib.contextmanager
def _ptx_only() -> Iterator[None]:
    """Compile without ptxas, half of the time, into a cache of its own: Triton 3.6 has the hook, but not in its key."""
    hook, folder = knobs.runtime.add_stages_inspection_hook, knobs.cache.dir
    knobs.runtime.add_stages_inspection_hook = _stop_at_ptx
    knobs.cache.dir = os.path.join(folder, "ptx")
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook, knobs.cache.dir = hook, folder


def compile_ptx(variant: Variant, arch: int) -> Compiled:
    """Compile a kernel for compute capability `arch`, as far as PTX."""
    names = variant.kernel.arg_names
    source = ASTSource(
        variant.kernel,
        signature=variant.signature,
        constexprs=variant.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    with _ptx_only():
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return Compiled(compiled.asm["ptx"], compiled.metadata.shared, compiled.metadata.num_warps)


class Interpreter:
    """Carries out launches for one architecture.

    Args:
        arch: compute capability, times 10: 80 or 90.
        rounded: round products as the tensor cores do, or once.

    Attributes:
        launches: what ran, with the inputs it ran on.
        ambiguous: for each kernel, how many instructions left it to the GPU which value stays.
    """

    def __init__(self, arch: int, rounded: bool = True):
        self.arch = arch
        self.launches: list[Prepared] = []
        self.ambiguous: dict[str, int] = {}
        self._rounding = ROUNDING[arch] if rounded else None

    def launch(self, launched: Launch) -> None:
        """Compile and run a launch, in place of Triton."""
        kernel, arguments = launched.kernel, launched.arguments
        variant = specialize(kernel.__name__, launched, (self.arch,))
        compiled = _compiled(variant, self.arch)
        tensors: dict[int, Tensor] = {}
        for argument in arguments.values():
            if isinstance(argument, Tensor):
                tensors.setdefault(argument.untyped_storage().data_ptr(), argument)
        storages = [_bytes_of(tensor) for tensor in tensors.values()]
        start = dict(zip(tensors, GlobalMemory.addresses_of(storages)))
        values = [
            _argument(arguments[name], variant.signature[name], start)
            for name in kernel.arg_names
            if variant.signature[name] != "constexpr"
        ]
        copies = [storage.copy() for storage in storages]
        threads = 32 * compiled.num_warps
        prepared = Prepared(variant.name, compiled.ptx, launched.grid, threads, compiled.shared, copies, values)
        self.launches.append(prepared)
        memory, ambiguous = prepared.run(self._rounding)
        self.ambiguous[variant.name] = self.ambiguous.get(variant.name, 0) + ambiguous
        for i, storage in enumerate(storages):
            storage[:] = memory.contents(i)

    @contextlib.contextmanager
    def installed(self) -> Iterator["Interpreter"]:
        """Replace the launches of all ops, and let `backend="triton"` take tensors on the CPU."""
        from simsid.kernels.attention import op as attention
        from simsid.kernels.layer_norm import op as layer_norm
        from simsid.kernels.memory import fused, launchers
        from simsid.kernels.memory import op as memory

        def target_of(device: torch.device) -> launchers.Target:
            return launchers.Target("tf32x3", warp_groups=self.arch == 90)

        with contextlib.ExitStack() as stack:
            for module in (launchers, fused):
                stack.enter_context(mock.patch.object(module, "target_of", target_of))
            for op in (memory, attention, layer_norm):  # without what was planned for another architecture
                stack.enter_context(mock.patch.object(op, "_handles", Handles()))
            stack.enter_context(mock.patch.object(backend, "interpreter_on", lambda: True))
            stack.enter_context(launches_by(self.launch))
            yield self


_compilations: dict[tuple, Compiled] = {}


def _compiled(variant: Variant, arch: int) -> Compiled:
    key = (variant.key, arch)
    if key not in _compilations:
        _compilations[key] = compile_ptx(variant, arch)
    return _compilations[key]


@functools.lru_cache(maxsize=256)
def _translated(ptx: str) -> Kernel:
    return translate(parse(ptx))


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def _argument(value: object, kind: str, start: dict[int, int]) -> np.ndarray:
    """Return the bits of an argument as the launcher would pass it."""
    if isinstance(value, Tensor):
        address = start[value.untyped_storage().data_ptr()] + value.storage_offset() * value.element_size()
        return np.array([address], np.uint64)
    if kind == "fp32":
        return np.array([value], np.float32).view(np.uint32)
    return np.array([value], np.int32 if kind == "i32" else np.int64).view(np.uint32 if kind == "i32" else np.uint64)

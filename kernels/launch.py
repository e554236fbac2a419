"""The only function that launches kernels, so that tests can count launches and compile what would be launched."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

ARCHITECTURES = (80, 90, 100)  # compute capabilities, times 10, that the kernels are compiled and checked for
_NOTHING = contextlib.nullcontext()


class Launch(NamedTuple):
    """One launch as the host code asked for it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


Again = Callable[..., object]  # makes a launch again, with the values of all arguments of the kernel in their order


def _by_triton(launched: Launch) -> Again | None:
    kernel, grid, arguments, num_warps, num_stages = launched
    # Triton 3.10 changes the default of enable_fp_fusion: without the name, rounding would follow the version.
    compiled = kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)
    return None if compiled is None else compiled[(*grid, 1, 1)[:3]]  # None: the interpreter compiles nothing


Carrier = Callable[[Launch], Again | None]
_carrier: Carrier = _by_triton  # carries out all launches


def launch(kernel: Any, grid: tuple[int, ...], num_warps: int, num_stages: int, **arguments: Any) -> None:
    """Launch `kernel` over `grid` with every argument by name, on the current device and stream."""
    _carrier(Launch(kernel, grid, arguments, num_warps, num_stages))


class Repeated:
    """A launch that is made many times, of numbers that stay and of tensors of the same dtypes and alignment.

    The first time Triton compiles the kernel, or finds it by the dtypes and divisibility of all arguments, which takes
    10 to 30 microseconds. After that the compiled kernel is launched itself.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], num_warps: int, num_stages: int) -> None:
        self.kernel, self.grid, self.options = kernel, grid, (num_warps, num_stages)
        self.carrier: Carrier | None = None
        self.again: Again | None = None

    def __call__(self, *values: Any) -> None:
        """Launch with the values of all arguments, in the order of the kernel's parameters."""
        if self.again is not None and self.carrier is _carrier:
            self.again(*values)
        else:
            arguments = dict(zip(self.kernel.arg_names, values))
            self.carrier, self.again = _carrier, _carrier(Launch(self.kernel, self.grid, arguments, *self.options))


@contextlib.contextmanager
def launches_by(carrier: Carrier) -> Iterator[None]:
    """Let a function carry out all launches inside the context, in place of Triton."""
    global _carrier
    before, _carrier = _carrier, carrier
    try:
        yield
    finally:
        _carrier = before


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU the current one, which Triton launches on; costs nothing where it already is."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)


@contextlib.contextmanager
def record_launches(run: bool = True) -> Iterator[list[Launch]]:
    """Collect the launches made inside the context.

    Args:
        run: also launch. Without it nothing runs, so that tensors on the meta device suffice.

    Yields:
        The list that grows with each launch.
    """
    launches: list[Launch] = []
    before = _carrier

    def record(launched: Launch) -> None:
        launches.append(launched)
        if run:
            before(launched)

    with launches_by(record):
        yield launches


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below `number`, as sizes of tiles must be."""
    return 1 << (number - 1).bit_length()


def ceil_div(number: int, divisor: int) -> int:
    """Divide and round up: the programs that cover `number` elements."""
    return -(-number // divisor)

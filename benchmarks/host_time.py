"""Time what a call of each op costs the host: everything but the launches, which are left out; no GPU is needed.

    python benchmarks/host_time.py
    python benchmarks/host_time.py --triton     with the launches, as far as Triton's own code goes

On tiny tensors on the CPU, so that allocations cost little. `least` is an autograd function that does nothing but
allocate the results and gradients: what PyTorch's engine costs any fused op.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from simsid.kernels import backend, neighbor_attention, residual_layer_norm, space_aware_memory
from simsid.kernels.launch import launches_by

BLOCKS, CALLS = 400, 20  # the fastest block counts: what disturbs a block makes it slower


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Let `backend="triton"` take tensors on the CPU."""
    before = backend.interpreter_on
    backend.interpreter_on = lambda: True
    try:
        yield
    finally:
        backend.interpreter_on = before


class NoDriver:
    """Stands in for Triton's driver: kernels are compiled for compute capability 9.0, and `launch` gets the launches.

    It must be set before the first kernel is launched, and stays.
    """

    def __init__(self, launch: Callable[..., None]) -> None:
        self.utils, self.launch = self, launch

    def set(self) -> None:
        """Let Triton use this driver."""
        from triton.runtime import driver

        driver.set_active(self)

    def get_current_target(self) -> Any:
        """Return what to compile for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Return the number of the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002
        """Return the number of the only stream."""
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:  # noqa: ARG002
        """Return as much as Triton asks for."""
        return {"max_shared_mem": 227 * 1024}

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:  # noqa: ARG002
        """Return what launches a compiled kernel."""
        return self.launch

    def load_binary(self, *_: object) -> tuple[int, int, int, int, int]:
        """Return module, function, registers, spills and threads."""
        return 0, 0, 32, 0, 1024


class _Least(torch.autograd.Function):
    """Allocate one result, and in the backward a gradient for each input."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty_like(tensors[0])

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)


def calls() -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Return the ops with their inputs, all of which get gradients."""
    rows, items, row = torch.randn(4, 2, 4, 16), torch.randn(4, 8, 16), torch.randn(4, 16)
    query, key, value, residual = rows
    weight, bias, pad_key, pad_value = row

    def attention(query: Tensor, key: Tensor, value: Tensor, pad_key: Tensor, pad_value: Tensor) -> Tensor:
        pads = {"pad_key": pad_key, "pad_value": pad_value}
        return neighbor_attention(query, key, value, (2, 2), 2, **pads, backend="triton")

    def packed(query: Tensor, key_value: Tensor, pads: Tensor) -> Tensor:
        return neighbor_attention(query, key_value, None, (2, 2), 2, pad_key=pads, backend="triton")

    return {
        "space_aware_memory": (lambda *x: space_aware_memory(*x, backend="triton"), (query, items)),
        "neighbor_attention": (attention, (query, key, value, pad_key, pad_value)),
        "the same without pads": (
            lambda *x: neighbor_attention(*x, (2, 2), 2, backend="triton"),
            (query, key, value),
        ),
        "the same, packed": (packed, (query, torch.randn(2, 4, 32), torch.randn(32))),
        "residual_layer_norm": (
            lambda *x: residual_layer_norm(*x, backend="triton"),
            (query, residual, weight, bias),
        ),
        "least, 2 tensors": (_Least.apply, (query, items)),
        "least, 5 tensors": (_Least.apply, (query, key, value, pad_key, pad_value)),
    }


def seconds(call: Callable[[], object]) -> float:
    """Return the seconds of a call in the fastest block of calls."""
    fastest = float("inf")
    for _ in range(BLOCKS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        fastest = min(fastest, (time.perf_counter() - start) / CALLS)
    return fastest


def main() -> None:
    """Print microseconds of every op's forward pass, and of forward and backward."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--triton", action="store_true", help="launch, but for the call of the GPU's driver")
    if parser.parse_args().triton:
        NoDriver(lambda *_: None).set()
        carried = contextlib.nullcontext()
    else:
        carried = launches_by(lambda _: lambda *_: None)
    torch.set_num_threads(1)
    print(f"{'microseconds of host time':28}  forward  forward + backward")
    with on_cpu(), carried:
        for name, (call, tensors) in calls().items():
            inputs = tuple(tensor.clone().requires_grad_() for tensor in tensors)
            cotangent = torch.ones_like(inputs[0])
            with torch.no_grad():
                forward = seconds(lambda: call(*inputs))  # noqa: B023
            both = seconds(lambda: torch.autograd.grad(call(*inputs), inputs, cotangent))  # noqa: B023
            print(f"{name:28} {1e6 * forward:8.1f} {1e6 * both:19.1f}")


if __name__ == "__main__":
    main()

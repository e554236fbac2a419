"""The only function that launches kernels, so that tests can count launches and compile what would be launched."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

ARCHITECTURES = (80, 90, 100)  # compute capabilities, times 10, that the kernels are compiled and checked for


class Plan(NamedTuple):
    """What a launch needs beside its tensors: the same for all calls of the same shapes, strides and dtypes."""

    grid: tuple[int, ...]
    num_warps: int
    num_stages: int
    constants: dict[str, Any]


class Launch(NamedTuple):
    """One launch as the host code asked for it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


_recorders: list[tuple[list[Launch], bool]] = []


def launch(kernel: Any, grid: tuple[int, ...], num_warps: int, num_stages: int, **arguments: Any) -> None:
    """Launch `kernel` over `grid` with every argument by name, on the current device and stream."""
    if _recorders:
        launches, run = _recorders[-1]
        launches.append(Launch(kernel, grid, arguments, num_warps, num_stages))
        if not run:
            return
    # Triton 3.10 changes the default of enable_fp_fusion: without the name, rounding would follow the version.
    kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU the current one, which Triton launches on; costs nothing where it already is."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
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
    _recorders.append((launches, run))
    try:
        yield launches
    finally:
        _recorders.pop()


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below `number`, as sizes of tiles must be."""
    return 1 << (number - 1).bit_length()


def ceil_div(number: int, divisor: int) -> int:
    """Divide and round up: the programs that cover `number` elements."""
    return -(-number // divisor)

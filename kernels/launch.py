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


_carriers: list[Callable[[Launch], None]] = []  # the last one carries out the launches, in place of Triton


def launch(kernel: Any, grid: tuple[int, ...], num_warps: int, num_stages: int, **arguments: Any) -> None:
    """Launch `kernel` over `grid` with every argument by name, on the current device and stream."""
    carry_out(Launch(kernel, grid, arguments, num_warps, num_stages))


def carry_out(launched: Launch) -> None:
    """Carry out a launch on the current device and stream."""
    if _carriers:
        _carriers[-1](launched)
    else:
        _by_triton(launched)


def _by_triton(launched: Launch) -> None:
    kernel, grid, arguments, num_warps, num_stages = launched
    # Triton 3.10 changes the default of enable_fp_fusion: without the name, rounding would follow the version.
    kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


@contextlib.contextmanager
def launches_by(carrier: Callable[[Launch], None]) -> Iterator[None]:
    """Let a function carry out all launches inside the context, in place of Triton."""
    _carriers.append(carrier)
    try:
        yield
    finally:
        _carriers.pop()


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
    before = _carriers[-1] if _carriers else _by_triton

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

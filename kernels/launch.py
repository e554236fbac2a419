"""One door for every launch, so that tests can count launches and `inspect` can compile what would be launched."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
        recorded, run = _recorders[-1]
        recorded.append(Launch(kernel, grid, arguments, num_warps, num_stages))
        if not run:
            return
    # Triton 3.10 changes the default of enable_fp_fusion: without the name, rounding would follow the version.
    kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU the current one, which Triton launches on; costs nothing where it already is."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


@contextlib.contextmanager
def record_launches(run: bool = True) -> Iterator[list[Launch]]:
    """Collect the launches made inside; `run=False` makes none of them, so that meta tensors will do."""
    recorded: list[Launch] = []
    _recorders.append((recorded, run))
    try:
        yield recorded
    finally:
        _recorders.pop()

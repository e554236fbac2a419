"""Time the memory's joint gradient beside autograd's, and one training iteration with each, on a CPU.

    OMP_NUM_THREADS=2 python benchmarks/joint_gradient.py

Milliseconds: both passes of `space_aware_memory` in float32, the best of several, and iterations of the preset
`digit_anatomy`, the median of several that alternate. "autograd" is the reference, `simsid.kernels.memory.reference`.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from batch_norm import best, demo_step

from simsid.kernels.memory import op
from simsid.kernels.memory.joint_gradient import space_aware_memory_torch
from simsid.kernels.memory.reference import space_aware_memory_reference

SHAPES = {
    "demo, last decoder memory": (16, 9, 100, 4096),
    "demo, first decoder memory": (16, 9, 100, 2048),
    "published size (B)": (16, 16, 100, 8192),
}
"""Batch, locations, items and features."""


def both_passes(function: Callable[..., Any], shape: Sequence[int], calls: int) -> float:
    """Return the milliseconds of a look-up of `[B, L, D]` in `[L, N, D]` and its gradients."""
    B, L, N, D = shape
    query, memory = torch.randn(B, L, D, requires_grad=True), torch.randn(L, N, D, requires_grad=True)
    noise, grad = torch.randn(B, L, N), torch.randn(B, L, D)
    options = (5, "inclusive", noise, 1.0, "dot", None)
    return best(lambda: torch.autograd.grad(function(query, memory, *options)[0], (query, memory), grad), calls)


def iterations(precision: str, calls: int) -> list[float]:
    """Return the milliseconds of an iteration of both sides, with each of the two gradients in turn."""
    step, images = demo_step(precision)
    kinds = (space_aware_memory_reference, space_aware_memory_torch)
    seconds: list[list[float]] = [[], []]
    for _ in range(calls + 2):
        for function, measured in zip(kinds, seconds):
            with mock.patch.object(op, "space_aware_memory_torch", function):
                began = time.perf_counter()
                step(images, 0)
                measured.append(time.perf_counter() - began)
    return [1e3 * statistics.median(measured[2:]) for measured in seconds]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=20, help="timed calls of each")
    calls = parser.parse_args(arguments).calls
    print("| | autograd | joint |\n| --- | ---: | ---: |", flush=True)
    for name, shape in SHAPES.items():
        kinds = (space_aware_memory_reference, space_aware_memory_torch)
        theirs, ours = (both_passes(function, shape, calls) for function in kinds)
        print(f"| {name}: {' x '.join(map(str, shape))} | {theirs:.1f} | {ours:.1f} |", flush=True)
    for precision in ("float32", "bfloat16"):
        reference, joint = iterations(precision, calls)
        print(f"| iteration of both sides, {precision} | {reference:.0f} | {joint:.0f} |", flush=True)


if __name__ == "__main__":
    main()

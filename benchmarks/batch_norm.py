"""Time the models' BatchNorm beside PyTorch's, and one training iteration with each, on a CPU.

    OMP_NUM_THREADS=2 python benchmarks/batch_norm.py

Milliseconds, the best of several, of maps and iterations of the preset `digit_anatomy`. Maps of 16 channels and more,
such as the last, keep PyTorch's kernel in both columns.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn

from simsid.config import Config
from simsid.models import batch_norm
from simsid.models.presets import seeded_model
from simsid.study.plan import short_training
from simsid.training.step import TrainingStep

SHAPES = ((16, 8, 96, 96), (144, 8, 32, 32), (16, 16, 48, 48))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def best(run: Callable[[], object], calls: int) -> float:
    """Return the milliseconds of the fastest call, after two that are not counted."""
    seconds = []
    for _ in range(calls + 2):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return 1e3 * min(seconds[2:])


def maps(kind: type[nn.BatchNorm2d], shape: Sequence[int], dtype: torch.dtype, calls: int) -> list[float]:
    """Return the milliseconds of a forward pass in training mode, and of both passes."""
    norm: Any = kind(shape[1])
    x = torch.randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn_like(x)
    inputs = (x, norm.weight, norm.bias)
    return [best(lambda: norm(x), calls), best(lambda: torch.autograd.grad(norm(x), inputs, grad), calls)]


def demo_step(precision: str) -> tuple[TrainingStep, torch.Tensor]:
    """Return the demo's training step and a batch."""
    config = Config.digit_anatomy()
    step = TrainingStep(
        seeded_model("digit_anatomy", config, 0, "cpu").train(),  # type: ignore[arg-type]  # a network
        short_training(4, digits=True, precision=precision),
    )
    return step, torch.rand(16, 1, config.image_size, config.image_size) * 2 - 1


def iteration(precision: str, calls: int) -> list[float]:
    """Return the milliseconds of an iteration of both sides, and of the discriminator alone."""
    step, images = demo_step(precision)
    return [best(lambda: step(images, number), calls) for number in (0, 1)]  # noqa: B023 - called at once


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=20, help="timed calls of each")
    calls = parser.parse_args(arguments).calls
    print("| | dtype | PyTorch's | simsid's |\n| --- | --- | ---: | ---: |")
    for name, dtype in DTYPES.items():
        for shape in SHAPES:
            theirs, ours = (maps(kind, shape, dtype, calls) for kind in (nn.BatchNorm2d, batch_norm.BatchNorm2d))
            for what, one, other in zip(("forward", "forward and backward"), theirs, ours):
                print(f"| {' x '.join(map(str, shape))}, {what} | {name} | {one:.2f} | {other:.2f} |")
        ours = iteration(name, max(calls // 2, 1))
        with mock.patch.object(batch_norm, "VECTOR", 0):  # no map has fewer channels: all are left to PyTorch
            theirs = iteration(name, max(calls // 2, 1))
        for what, one, other in zip(("both sides", "the discriminator alone"), theirs, ours):
            print(f"| iteration of {what} | {name} | {one:.0f} | {other:.0f} |")


if __name__ == "__main__":
    main()

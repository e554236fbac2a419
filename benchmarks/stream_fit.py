"""Fit a feature memory to a long stream of images; print the time and the largest memory of the process.

    OMP_NUM_THREADS=1 python benchmarks/stream_fit.py --images 100000

The images are random and smooth, drawn a batch at a time, and nothing else holds them.
"""

import argparse
import resource
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from simsid import FeatureMemory
from simsid.models.scorer import BATCH


def stream(images: int, size: int, seed: int = 0) -> Iterator[Tensor]:
    """Yield batches `[b, 1, size, size]` in -1..1."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, images, BATCH):
        coarse = torch.rand(min(BATCH, images - start), 1, 8, 8, generator=generator) * 2 - 1
        yield torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit and print a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--most", type=int, default=1000, help="images whose features are kept (default: 1000)")
    options = parser.parse_args(arguments)
    model = FeatureMemory(most_images=options.most)
    began = time.perf_counter()
    model.fit(stream(options.images, 224))
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{options.images} images, {options.most} kept: {seconds:.0f} s, at most {peak:.0f} MB")


if __name__ == "__main__":
    main()

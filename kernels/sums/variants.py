"""The variants of the sum of partial gradients that the compile gate covers."""

import functools
from collections.abc import Callable, Iterator

import torch

from simsid.kernels.launch import ARCHITECTURES
from simsid.kernels.sums.launchers import sum_parts


def cases() -> Iterator[tuple[str, Callable[[], object], tuple[int, ...]]]:
    """Yield names, host calls on meta tensors and the architectures that launch them: presets and limits."""
    for features, dtype in ((512, torch.float32), (512, torch.bfloat16), (35, torch.float32)):
        parts = torch.empty(16, 2, features, device="meta")
        one, both = (torch.empty(size, dtype=dtype, device="meta") for size in (features, 2 * features))
        name = f"D={features} {str(dtype).removeprefix('torch.')}"
        yield name, functools.partial(sum_parts, parts, one, one), ARCHITECTURES
        yield f"{name} packed", functools.partial(sum_parts, parts, both, None), ARCHITECTURES

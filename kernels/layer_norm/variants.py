"""The variants of the residual + LayerNorm + ReLU kernels that the compile gate covers."""

import functools
import itertools
from collections.abc import Callable, Iterator

import torch

from simsid.kernels.launch import ARCHITECTURES
from simsid.kernels.layer_norm.fused import layer_norm_backward, layer_norm_forward


def cases() -> Iterator[tuple[str, Callable[[], object], tuple[int, ...]]]:
    """Yield names, host calls on meta tensors and the architectures that launch them: presets and limits."""
    lengths = (512, 8192, 35)  # the in-painting block, the longest row, a row that no vector divides
    counts = (256, 1, 4000)  # rows, which must not change the machine code
    for features, dtype, rows in itertools.product(lengths, (torch.float32, torch.bfloat16), counts):
        x = torch.empty(rows, features, dtype=dtype, device="meta")
        weight, statistics = torch.empty(features, device="meta"), torch.empty(rows, 2, device="meta")
        name = f"D={features} {str(dtype).removeprefix('torch.')}"
        forward = functools.partial(layer_norm_forward, x, x, weight, weight, 1e-5)
        backward = functools.partial(layer_norm_backward, x, x, weight, x, statistics, dtype, torch.float32)
        yield f"forward {name}", forward, ARCHITECTURES
        yield f"backward {name}", backward, ARCHITECTURES

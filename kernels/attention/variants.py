"""The variants of the neighbor-attention kernels that the compile gate covers."""

import functools
import itertools
from collections.abc import Callable, Iterator

import torch

from simsid.kernels.attention.fused import attention_backward, attention_forward
from simsid.kernels.launch import ARCHITECTURES


def cases() -> Iterator[tuple[str, Callable[[], object], tuple[int, ...]]]:
    """Yield names, host calls on meta tensors and the architectures that launch them: presets and limits."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    sizes = [
        ((4, 4), 512, 8, (fp32, bf16), (True, False)),  # SimSID
        ((4, 4), 128, 8, (fp16,), (True,)),
        ((2, 2), 2048, 8, (fp32, bf16), (True,)),  # SQUID
        ((3, 3), 256, 8, (fp32, bf16), (True,)),  # DigitAnatomy
        ((8, 8), 512, 8, (fp32, bf16), (True,)),
        ((16, 16), 512, 8, (fp32, bf16), (True,)),  # the largest grid
        ((3, 5), 35, 5, (fp32, bf16), (True,)),  # no size that a vector or a tile divides
    ]
    for grid, features, heads, dtypes, pads in sizes:
        for dtype, padded in itertools.product(dtypes, pads):
            tensor = torch.empty(2, grid[0] * grid[1], features, dtype=dtype, device="meta")
            pad = torch.empty(features, device="meta") if padded else None
            arguments = (tensor, tensor, tensor, pad, pad, *grid, heads)
            name = f"{grid[0]}x{grid[1]} D={features} {str(dtype).removeprefix('torch.')}{' pads' if padded else ''}"
            yield f"forward {name}", functools.partial(attention_forward, *arguments), ARCHITECTURES
            yield f"backward {name}", functools.partial(attention_backward, tensor, *arguments), ARCHITECTURES

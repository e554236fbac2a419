"""The variants of the neighbor-attention kernels that the compile gate covers."""

import functools
import itertools
from collections.abc import Callable, Iterator

import torch

from simsid.kernels.attention.fused import attention_backward, attention_forward
from simsid.kernels.attention.plan import Window
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
            arguments = (tensor, tensor, tensor, pad, pad, None, grid, heads, Window())
            name = f"{grid[0]}x{grid[1]} D={features} {str(dtype).removeprefix('torch.')}{' pads' if padded else ''}"
            yield f"forward {name}", functools.partial(attention_forward, *arguments), ARCHITECTURES
            yield f"backward {name}", functools.partial(attention_backward, tensor, *arguments), ARCHITECTURES
    yield from _windows()


def _windows() -> Iterator[tuple[str, Callable[[], object], tuple[int, ...]]]:
    """Yield the cases of other windows, masks and packed keys and values."""
    windows = {"3x3 with center": Window(center=True), "3x3 dilation 2": Window(row_step=2, column_step=2)}
    grids = (((4, 4), torch.float32), ((16, 16), torch.float32), ((16, 16), torch.bfloat16))
    cases = [(name, grid, dtype) for name in windows for grid, dtype in grids]
    for name, grid, dtype in cases:
        tensor = torch.empty(2, grid[0] * grid[1], 512, dtype=dtype, device="meta")
        pad, mask = torch.empty(512, device="meta"), torch.empty(tensor.shape[:2], dtype=torch.bool, device="meta")
        arguments = (tensor, tensor, tensor, pad, pad, mask, grid, 8, windows[name])
        name = f"{name} in {grid[0]}x{grid[1]} D=512 {str(dtype).removeprefix('torch.')} pads mask"
        yield f"forward {name}", functools.partial(attention_forward, *arguments), ARCHITECTURES
        yield f"backward {name}", functools.partial(attention_backward, tensor, *arguments), ARCHITECTURES
    query, pads = torch.empty(2, 16, 512, device="meta"), torch.empty(1024, device="meta")
    packed = (query, torch.empty(2, 16, 1024, device="meta"), None, pads, None, None, (4, 4), 8, Window())
    yield "backward 4x4 D=512 float32 pads packed", functools.partial(attention_backward, query, *packed), ARCHITECTURES

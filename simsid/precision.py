"""The number format of the networks' arithmetic: float32, or bfloat16 where the processor computes it faster."""

import functools
import time
from typing import Literal, cast

import torch
from torch.nn import functional as F

from simsid.errors import InputError

Concrete = Literal["float32", "bfloat16"]
PRECISIONS = ("auto", "float32", "bfloat16")

INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
"""Instructions that multiply bfloat16 numbers and sum in float32, by PyTorch's names. Without them every number is
converted to float32 and back, which takes longer than float32 alone."""


@functools.cache
def bfloat16_instructions() -> tuple[str, ...]:
    """Return which of `INSTRUCTIONS` this processor reports and PyTorch's convolutions can use; empty: none."""
    if not torch.backends.mkldnn.is_available():
        return ()
    reported: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    if not reported:  # older than PyTorch 2.11
        reported = {"avx512_bf16": torch.cpu._is_avx512_bf16_supported()}
    return tuple(name for name in INSTRUCTIONS if reported.get(name))


def check_precision(requested: str, known: tuple[str, ...] = PRECISIONS) -> str:
    """Return `requested`; raise `InputError` unless it is `"auto"` or one of `known`."""
    choices = tuple(dict.fromkeys(("auto", *known)))
    if requested not in choices:
        raise InputError(f"precision must be one of {', '.join(choices)} here, got {requested!r}")
    return requested


def choose_precision(requested: str, device: torch.device | str, weights: torch.dtype = torch.float32) -> Concrete:
    """Return `"float32"` or `"bfloat16"`: what was asked for; for `"auto"`, bfloat16 on CPUs with the instructions.

    The processor's report decides and not a timing, which other work could turn: the same machine must choose the
    same precision every time, since calibrations and training states belong to one.

    Raises:
        InputError: another value of `requested`.
    """
    if check_precision(requested) != "auto":
        return cast("Concrete", requested)
    helps = torch.device(device).type == "cpu" and weights is torch.float32 and bfloat16_instructions()
    return "bfloat16" if helps else "float32"


def measured_speedup(rounds: int = 7) -> float:
    """Return how many times faster this CPU computes a 3x3 convolution of 64 channels in bfloat16 than in float32."""
    x = torch.randn(8, 64, 64, 64).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3).contiguous(memory_format=torch.channels_last)
    inputs = {dtype: (x.to(dtype), weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in inputs}
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for dtype, (images, filters) in inputs.items():
                start = time.perf_counter()
                F.conv2d(images, filters, padding=1)
                seconds[dtype].append(time.perf_counter() - start)
    # The first call chooses and compiles the kernel.
    return min(seconds[torch.float32][1:]) / min(seconds[torch.bfloat16][1:])

"""Launcher of the sum of partial gradients."""

from torch import Tensor

from simsid.kernels.launch import ceil_div, launch
from simsid.kernels.sums.kernels import sum_parts_kernel

BLOCK_P, BLOCK_D = 32, 32  # rows of 128 bytes; 8 numbers a thread are loaded at once


def sum_parts(parts: Tensor, first: Tensor, second: Tensor | None) -> None:
    """Write the sums of `parts`, `[parts, 2, D]`, to `first` and `second`; both to `first` where `second` is None."""
    count, _, features = parts.shape
    launch(
        sum_parts_kernel,
        (ceil_div(features, BLOCK_D), 2),
        4,
        1,
        parts_ptr=parts,
        first_ptr=first,
        second_ptr=first if second is None else second,
        parts=count,
        D=features,
        BEHIND=features if second is None else 0,
        BLOCK_P=BLOCK_P,
        BLOCK_D=BLOCK_D,
    )

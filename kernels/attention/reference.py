"""Attention to the eight neighbours in plain PyTorch: the truth that fused kernels are tested against."""

import torch
from torch import Tensor

OFFSETS = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if (row, column) != (0, 0)]


def neighbor_index(grid: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Return `[L, 8]`: the row-major location of each neighbour, and `L` where it lies outside the grid."""
    rows, columns = grid
    i = torch.arange(rows, device=device).repeat_interleave(columns)
    j = torch.arange(columns, device=device).repeat(rows)
    neighbors = []
    for di, dj in OFFSETS:
        inside = (i + di >= 0) & (i + di < rows) & (j + dj >= 0) & (j + dj < columns)
        neighbors.append(torch.where(inside, (i + di) * columns + j + dj, rows * columns))
    return torch.stack(neighbors, dim=1)


def neighbor_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    heads: int,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
) -> Tensor:
    """Compute the op's docstring by gathering the neighbours of every location, in float32 or better, autocast off."""
    B, L, D = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    index = neighbor_index(grid, query.device)
    outside = index == L

    def windows(x: Tensor, pad: Tensor | None) -> Tensor:
        pad = x.new_zeros(D) if pad is None else pad
        padded = torch.cat([x.to(dtype), pad.to(dtype).expand(B, 1, D)], dim=1)
        return padded[:, index].unflatten(-1, (heads, D // heads))

    with torch.autocast(query.device.type, enabled=False):
        q = query.to(dtype).unflatten(-1, (heads, D // heads))
        k, v = windows(key, pad_key), windows(value, pad_value)
        logits = torch.einsum("blhd,blwhd->blhw", q, k) * (D // heads) ** -0.5
        if pad_key is None:
            logits = logits.masked_fill(outside[:, None], float("-inf"))
            alone = outside.all(-1)[:, None, None]
            weight = torch.softmax(logits.masked_fill(alone, 0.0), dim=-1).masked_fill(alone, 0.0)
        else:
            weight = torch.softmax(logits, dim=-1)
        out = torch.einsum("blhw,blwhd->blhd", weight, v)
    return out.flatten(-2).to(query.dtype)

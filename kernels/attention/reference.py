"""Attention to the eight neighbors in plain PyTorch: the reference that the fused kernels are tested against."""

import torch
from torch import Tensor
from torch.nn import Parameter

OFFSETS = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if (row, column) != (0, 0)]

_stored: dict[tuple[tuple[int, int], torch.device], Tensor] = {}


def neighbor_index(grid: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Return `[L, 8]`: the row-major location of each neighbor, and `L` where it lies outside the grid."""
    rows, columns = grid
    i = torch.arange(rows, device=device).repeat_interleave(columns)
    j = torch.arange(columns, device=device).repeat(rows)
    neighbors = []
    for di, dj in OFFSETS:
        inside = (i + di >= 0) & (i + di < rows) & (j + dj >= 0) & (j + dj < columns)
        neighbors.append(torch.where(inside, (i + di) * columns + j + dj, rows * columns))
    return torch.stack(neighbors, dim=1)


def stored_neighbor_index(grid: tuple[int, int], query: Tensor) -> Tensor:
    """Return the index of `grid` on the query's device, made once: making it takes 140 kernels on a GPU.

    Inside a trace, a transform of `torch.func`, a tensor subclass's modes or a CUDA graph's capture it is made again:
    a tensor made there must not outlive them, and a stored one must not enter the first three.
    """
    capturing = query.is_cuda and torch.cuda.is_current_stream_capturing()
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or type(query) not in (Tensor, Parameter)
        or (capturing and (grid, query.device) not in _stored)
    ):
        return neighbor_index(grid, query.device)
    if (grid, query.device) not in _stored:
        with torch.inference_mode(False):  # autograd cannot save an inference tensor in a later call
            # A blocking copy from the host is complete for whichever stream reads it later.
            index = neighbor_index(grid).to(query.device)
        if type(index) is not Tensor:  # a mode such as FakeTensorMode is on
            return index
        _stored[grid, query.device] = index
    return _stored[grid, query.device]


def neighbor_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    heads: int,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
) -> Tensor:
    """Compute the op of `op.py` in float32 or wider, with autocast off; arguments already checked.

    The neighbors of every location are gathered into `[B, L, 8, D]`, eight times the size of key and value.
    """
    B, L, D = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    index = stored_neighbor_index(grid, query)
    outside = index == L

    def gather_neighbors(x: Tensor, pad: Tensor | None) -> Tensor:
        pad = x.new_zeros(D) if pad is None else pad
        padded = torch.cat([x.to(dtype), pad.to(dtype).expand(B, 1, D)], dim=1)
        return padded[:, index].unflatten(-1, (heads, D // heads))

    with torch.autocast(query.device.type, enabled=False):
        q = query.to(dtype).unflatten(-1, (heads, D // heads))
        k, v = gather_neighbors(key, pad_key), gather_neighbors(value, pad_value)
        logits = torch.einsum("blhd,blwhd->blhw", q, k) * (D // heads) ** -0.5
        if pad_key is None:
            logits = logits.masked_fill(outside[:, None], float("-inf"))
            alone = outside.all(-1)[:, None, None]
            weight = torch.softmax(logits.masked_fill(alone, 0.0), dim=-1).masked_fill(alone, 0.0)
        else:
            weight = torch.softmax(logits, dim=-1)
        out = torch.einsum("blhw,blwhd->blhd", weight, v)
    return out.flatten(-2).to(query.dtype)

"""Attention to a window of neighbors in plain PyTorch: the reference that the fused kernels are tested against."""

import torch
from torch import Tensor
from torch.nn import Parameter

from simsid.kernels.attention.plan import Window

NEIGHBORS = Window()

_stored: dict[tuple[tuple[int, int], Window, torch.device], Tensor] = {}


def offsets(window: Window = NEIGHBORS) -> list[tuple[int, int]]:
    """Return rows and columns from a location to each of its keys, row-major."""
    half_rows, half_columns = window.rows // 2, window.columns // 2
    return [
        (window.row_step * row, window.column_step * column)
        for row in range(-half_rows, half_rows + 1)
        for column in range(-half_columns, half_columns + 1)
        if window.center or (row, column) != (0, 0)
    ]


def neighbor_index(grid: tuple[int, int], device: torch.device | str = "cpu", window: Window = NEIGHBORS) -> Tensor:
    """Return `[L, keys]`: the row-major location of each neighbor, and `L` where it lies outside the grid."""
    rows, columns = grid
    i = torch.arange(rows, device=device).repeat_interleave(columns)
    j = torch.arange(columns, device=device).repeat(rows)
    neighbors = []
    for di, dj in offsets(window):
        inside = (i + di >= 0) & (i + di < rows) & (j + dj >= 0) & (j + dj < columns)
        neighbors.append(torch.where(inside, (i + di) * columns + j + dj, rows * columns))
    return torch.stack(neighbors, dim=1)


def stored_neighbor_index(grid: tuple[int, int], window: Window, query: Tensor) -> Tensor:
    """Return the index of `grid` on the query's device, made once: making it takes 140 kernels on a GPU.

    Inside a trace, a transform of `torch.func`, a tensor subclass's modes or a CUDA graph's capture it is made again:
    a tensor made there must not outlive them, and a stored one must not enter the first three.
    """
    key = grid, window, query.device
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or type(query) not in (Tensor, Parameter)
        or (key not in _stored and query.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return neighbor_index(grid, query.device, window)
    if key not in _stored:
        with torch.inference_mode(False):  # autograd cannot save an inference tensor in a later call
            # A blocking copy from the host is complete for whichever stream reads it later.
            index = neighbor_index(grid, window=window).to(query.device)
        if type(index) is not Tensor:  # a mode such as FakeTensorMode is on
            return index
        _stored[key] = index
    return _stored[key]


def neighbor_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    key_mask: Tensor | None,
    grid: tuple[int, int],
    heads: int,
    window: Window,
) -> Tensor:
    """Compute the op of `op.py` in float32 or wider, with autocast off; arguments already checked.

    The neighbors of every location are gathered into `[B, L, keys, D]`, as many times the size of key and value.
    """
    B, L, D = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    index = stored_neighbor_index(grid, window, query)
    left_out = (index == L)[None] if pad_key is None else None
    if key_mask is not None:
        # Masked keys and values become 0: a weight of 0 would not keep out a NaN, nor its gradient.
        key, value = (x.masked_fill(~key_mask[..., None], 0) for x in (key, value))
        takes_part = torch.cat([key_mask, key_mask.new_full((B, 1), pad_key is not None)], dim=1)
        left_out = ~takes_part[:, index]

    def gather_neighbors(x: Tensor, pad: Tensor | None) -> Tensor:
        pad = x.new_zeros(D) if pad is None else pad
        padded = torch.cat([x.to(dtype), pad.to(dtype).expand(B, 1, D)], dim=1)
        return padded[:, index].unflatten(-1, (heads, D // heads))

    with torch.autocast(query.device.type, enabled=False):
        q = query.to(dtype).unflatten(-1, (heads, D // heads))
        k, v = gather_neighbors(key, pad_key), gather_neighbors(value, pad_value)
        logits = torch.einsum("blhd,blwhd->blhw", q, k) * (D // heads) ** -0.5
        if left_out is None:
            weight = torch.softmax(logits, dim=-1)
        else:
            alone = left_out.all(-1)[..., None, None]
            logits = logits.masked_fill(left_out[:, :, None], float("-inf")).masked_fill(alone, 0.0)
            weight = torch.softmax(logits, dim=-1).masked_fill(alone, 0.0)
        out = torch.einsum("blhw,blwhd->blhd", weight, v)
    return out.flatten(-2).to(query.dtype)

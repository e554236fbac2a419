"""The neighbor-attention op: contract, checks and choice of backend."""

import operator
from typing import Any

from torch import Tensor

from simsid.kernels.attention.plan import refuse
from simsid.kernels.attention.reference import neighbor_attention_reference
from simsid.kernels.backend import choose_backend
from simsid.kernels.checks import check_integer, check_tensor
from simsid.kernels.ranges import named_range


@named_range
def neighbor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    heads: int = 8,
    *,
    pad_key: Tensor | None = None,
    pad_value: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from every location of a grid to its eight neighbors, the location itself excluded.

        a[b,l,h,m]   = softmax over the neighbors m of l of  <query[b,l,h], key[b,m,h]> / sqrt(D / heads)
        out[b,l,h,:] = sum_m a[b,l,h,m] value[b,m,h,:]

    Head `h` owns the features `h*D/heads` to `(h+1)*D/heads`. Projections belong to the caller.

    Source: SQUID (arXiv 2111.13495), section 3.4, and SimSID (arXiv 2403.08689), section 3.3, the in-painting block.

    Args:
        query: `[B, L, D]`, float16 to float64, locations row-major.
        key: `[B, L, D]`, same dtype and device.
        value: `[B, L, D]`, same dtype and device.
        grid: `(rows, columns)` with `rows * columns == L`.
        heads: number of heads; divides `D`.
        pad_key: `[D]`, stands in for the key of each neighbor outside the grid; None leaves those out.
        pad_value: `[D]`, the value to `pad_key`; both or neither.
        backend: `"auto"` (fused kernels on CUDA where they exist, PyTorch elsewhere), `"triton"` or `"torch"`. The
            kernels have no second derivative, no forward mode and no `torch.func` transforms; inside the last two,
            `"auto"` takes PyTorch.

    Returns:
        `[B, L, D]` in the query's dtype, computed in float32 (float64 for float64); zeros where a location
        has no neighbor. Gradients reach query, key, value, pad_key and pad_value.

    Raises:
        TypeError: a dtype or type that is not listed above.
        ValueError: a shape, device, grid, `heads` or `backend` that does not fit, or one pad without the other.
        RuntimeError: `backend="triton"` where the kernels cannot run, with the reason.
    """
    check_tensor("query", query, ("B", "L", "D"))
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(name, tensor, tuple(query.shape), like=("the query", query))
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have the query's dtype {query.dtype}, got {tensor.dtype}")
    _, locations, features = query.shape
    grid = _check_grid(grid, locations)
    heads = check_integer("heads", heads, least=1)
    if features % heads or not features:
        raise ValueError(f"heads must divide the {features} features, got {heads}")
    if (pad_key is None) != (pad_value is None):
        raise ValueError("pad_key and pad_value must be given together, got only one of them")
    if pad_key is not None and pad_value is not None:
        check_tensor("pad_key", pad_key, (features,), like=("the query", query))
        check_tensor("pad_value", pad_value, (features,), like=("the query", query))
    if choose_backend(backend, query.device, refuse(query.dtype, locations)).backend == "triton":
        from simsid.kernels.attention.fused import neighbor_attention_fused

        return neighbor_attention_fused(query, key, value, grid, heads, pad_key, pad_value)
    return neighbor_attention_reference(query, key, value, grid, heads, pad_key, pad_value)


def _check_grid(grid: Any, locations: int) -> tuple[int, int]:
    """Return the grid as two Python ints whose product is `locations`."""
    wanted = f"grid must be (rows, columns) of {locations} locations"
    try:
        sides = tuple([operator.index(side) for side in grid])
    except TypeError:
        raise TypeError(f"{wanted}, two integers, got {grid!r}") from None
    if len(sides) != 2 or min(sides) < 1 or sides[0] * sides[1] != locations:
        raise ValueError(f"{wanted}, got {sides}")
    return sides

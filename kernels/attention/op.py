"""The neighbor-attention op: contract, checks and choice of backend."""

import operator
from typing import Any

from torch import Tensor

from simsid.kernels.attention.plan import Window, refuse
from simsid.kernels.attention.reference import NEIGHBORS, neighbor_attention_reference
from simsid.kernels.backend import choose_backend
from simsid.kernels.checks import check_integer, check_tensor
from simsid.kernels.handles import Handles
from simsid.kernels.ranges import named_range

_handles = Handles()


@named_range
def neighbor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    grid: tuple[int, int],
    heads: int = 8,
    *,
    kernel_size: int | tuple[int, int] = 3,
    dilation: int | tuple[int, int] = 1,
    include_center: bool = False,
    key_mask: Tensor | None = None,
    pad_key: Tensor | None = None,
    pad_value: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from every location of a grid to a window around it: by default its eight neighbors, without itself.

        a[b,l,h,m]   = softmax over the neighbors m of l of  <query[b,l,h], key[b,m,h]> / sqrt(D / heads)
        out[b,l,h,:] = sum_m a[b,l,h,m] value[b,m,h,:]

    Head `h` owns the features `h*D/heads` to `(h+1)*D/heads`. Projections belong to the caller. The window keeps its
    place at the border of the grid: cells outside are left out, or stand for a pad; it is not shifted inwards.

    Source: SQUID (arXiv 2111.13495), section 3.4, and SimSID (arXiv 2403.08689), section 3.3, the in-painting block,
    which use the defaults of `kernel_size`, `dilation`, `include_center` and `key_mask`.

    Args:
        query: `[B, L, D]`, float16 to float64, locations row-major.
        key: `[B, L, D]`, same dtype and device; or, where `value` is None, `[B, L, 2 D]`: key and value side by side,
            as one projection makes them. Their gradient is then written side by side too, without a copy.
        value: `[B, L, D]`, same dtype and device, or None.
        grid: `(rows, columns)` with `rows * columns == L`.
        heads: number of heads; divides `D`.
        kernel_size: cells of the window, an odd integer or two of them, `(rows, columns)`.
        dilation: locations from one cell of the window to the next, an integer of at least 1 or two of them.
        include_center: whether a location attends to itself too; needed where the window is 1 x 1.
        key_mask: bool `[B, L]`, True where a key takes part, as in `scaled_dot_product_attention`. A key that is left
            out gets no weight and no gradient, even if it is not finite; its own location still attends. The pads are
            not masked. None takes all.
        pad_key: `[D]`, stands in for the key of each neighbor outside the grid; None leaves those out. `[2 D]`, with
            the pad of the value behind it, where `value` is None.
        pad_value: `[D]`, the value to `pad_key`; both or neither. None where `value` is.
        backend: `"auto"` (fused kernels on CUDA where they exist, PyTorch elsewhere), `"triton"` or `"torch"`. The
            kernels take at most 256 locations and 9 keys a window. They have no second derivative, no forward mode
            and no `torch.func` transforms; inside the last two, `"auto"` takes PyTorch.

    Returns:
        `[B, L, D]` in the query's dtype, computed in float32 (float64 for float64); zeros where a location has no key:
        no neighbor in the grid, or all of them masked, and no pad. Gradients reach query, key, value, pad_key and
        pad_value.

    Raises:
        TypeError: a dtype or type that is not listed above.
        ValueError: a shape, device, grid, `heads`, window or `backend` that does not fit, or one pad without the other.
        RuntimeError: `backend="triton"` where the kernels cannot run, with the reason.
    """
    tensors = (query, key, value, pad_key, pad_value, key_mask)
    signature, handle = _handles.find(tensors, (grid, heads, kernel_size, dilation, include_center, backend))
    if handle is not None:
        return handle.launch(tensors)
    check_tensor("query", query, ("B", "L", "D"))
    batch, locations, features = query.shape
    _check_keys(query, key, value, pad_key, pad_value)
    grid = _check_grid(grid, locations)
    heads = check_integer("heads", heads, least=1)
    if features % heads or not features:
        raise ValueError(f"heads must divide the {features} features, got {heads}")
    window = _check_window(kernel_size, dilation, include_center)
    if key_mask is not None:
        check_tensor("key_mask", key_mask, (batch, locations), like=("the query", query), boolean=True)
    if choose_backend(backend, query.device, refuse(query.dtype, locations, window)).backend == "triton":
        from simsid.kernels.attention import fused

        layout = fused.Layout(grid, heads, window)
        if signature is not None:
            _handles.keep(signature, tensors, fused.passes(layout))
        return fused.neighbor_attention_fused(tensors, layout)
    if value is None:
        key, value = key.chunk(2, -1)
        pad_key, pad_value = (None, None) if pad_key is None else pad_key.chunk(2)
    return neighbor_attention_reference(query, key, value, pad_key, pad_value, key_mask, grid, heads, window)


def _check_keys(
    query: Tensor, key: Tensor, value: Tensor | None, pad_key: Tensor | None, pad_value: Tensor | None
) -> None:
    """Check key, value and pads; without a value, key and pad_key are twice as wide and pad_value must be absent."""
    batch, locations, features = query.shape
    like = ("the query", query)
    width = features if value is not None else 2 * features
    check_tensor("key", key, (batch, locations, width), like)
    if key.dtype != query.dtype:
        raise TypeError(f"key must have the query's dtype {query.dtype}, got {key.dtype}")
    if value is not None:
        check_tensor("value", value, (batch, locations, features), like)
        if value.dtype != query.dtype:
            raise TypeError(f"value must have the query's dtype {query.dtype}, got {value.dtype}")
        if (pad_key is None) != (pad_value is None):
            raise ValueError("pad_key and pad_value must be given together, got only one of them")
    elif pad_value is not None:
        raise ValueError("pad_value must be None where value is: pad_key then holds both pads")
    if pad_key is not None:
        check_tensor("pad_key", pad_key, (width,), like)
    if pad_value is not None:
        check_tensor("pad_value", pad_value, (features,), like)


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


def _check_window(kernel_size: Any, dilation: Any, include_center: bool) -> Window:
    """Return the window; both sizes as Python ints."""
    if type(include_center) is not bool:
        raise TypeError(f"include_center must be True or False, got {include_center!r}")
    if not include_center and kernel_size == 3 and dilation == 1 and type(kernel_size) is type(dilation) is int:
        return NEIGHBORS
    sides, steps = _check_pair("kernel_size", kernel_size), _check_pair("dilation", dilation)
    if not sides[0] % 2 or not sides[1] % 2:
        raise ValueError(f"kernel_size must be odd, so that the window has a center, got {kernel_size!r}")
    window = Window(*sides, *steps, include_center)
    if not window.keys:
        raise ValueError("kernel_size 1 leaves a location without any key; use include_center=True")
    return window


def _check_pair(name: str, value: Any) -> tuple[int, int]:
    """Return an integer twice, or a sequence of two integers as they are."""
    if isinstance(value, (list, tuple)):
        if len(value) != 2:
            raise ValueError(f"{name} must be an integer or (rows, columns), got {value!r}")
        return check_integer(name, value[0], least=1), check_integer(name, value[1], least=1)
    value = check_integer(name, value, least=1)
    return value, value

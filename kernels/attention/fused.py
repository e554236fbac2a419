"""Launchers and gradient of neighbor attention."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simsid.kernels.attention.kernels import neighbor_attention_backward_kernel, neighbor_attention_forward_kernel
from simsid.kernels.attention.plan import GridPlan, plan_grid
from simsid.kernels.handles import Passes
from simsid.kernels.launch import launch, on_device
from simsid.kernels.library import empty_like, needs_gradient, register, run_backward
from simsid.kernels.sums.launchers import sum_parts

# query, key, value, pad_key, pad_value, key_mask
Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Layout(NamedTuple):
    """Everything of a call that is not a tensor."""

    grid: Sequence[int]
    heads: int
    window: Sequence[int]  # the fields of a `Window`


def _plan(query: Tensor, layout: Layout) -> GridPlan:
    rows, columns, _, _, center = layout.window
    return plan_grid(query.shape[1], query.shape[2] // layout.heads, query.element_size(), rows * columns - 1 + center)


def _common(tensors: Tensors, layout: Layout) -> dict[str, Any]:
    """Return the arguments that both kernels have, of tensors that need no copy.

    Without a value, values lie behind their keys in one tensor, and so do their pads and gradients.
    """
    query, key, value, pad_key, pad_value, key_mask = tensors
    values = key if value is None else value
    grid, heads, (rows, columns, row_step, column_step, center) = layout
    D = query.shape[2]
    tile = _plan(query, layout)
    return {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": values,
        "pad_key_ptr": pad_key,
        "pad_value_ptr": pad_key if value is None else pad_value,
        "key_mask_ptr": key_mask,
        "heads": heads,
        "scale": (D // heads) ** -0.5,
        "stride_q_b": query.stride(0),
        "stride_q_l": query.stride(1),
        "stride_k_b": key.stride(0),
        "stride_k_l": key.stride(1),
        "stride_v_b": values.stride(0),
        "stride_v_l": values.stride(1),
        "ROWS": grid[0],
        "COLUMNS": grid[1],
        "WINDOW_ROWS": rows,
        "WINDOW_COLUMNS": columns,
        "STEP_ROWS": row_step,
        "STEP_COLUMNS": column_step,
        "CENTER": bool(center),
        "WIDTH": D // heads,
        "BEHIND": D if value is None else 0,
        "HAS_PAD": pad_key is not None,
        "SLOTS": tile.slots,
        "BLOCK_L": tile.block_l,
        "BLOCK_W": tile.block_w,
    }


def _strided(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy where its last axis is strided, its start unaligned or 32-bit offsets too short.

    The vector width of the loads, and with it the order of the sums, follows the alignment: without the copy the bits
    of an image would depend on where in a larger batch it starts.
    """
    if tensor.stride(2) == 1 and tensor.shape[1] * tensor.stride(1) < 2**31:
        return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()


def _ready(tensors: Tensors) -> Tensors:
    """Return what the kernels can read: `_strided` queries, keys and values, contiguous pads, a mask of bytes."""
    query, key, value, pad_key, pad_value, key_mask = tensors
    return (
        _strided(query),
        _strided(key),
        None if value is None else _strided(value),
        None if pad_key is None else pad_key.contiguous(),
        None if pad_value is None else pad_value.contiguous(),
        None if key_mask is None else key_mask.contiguous().view(torch.uint8),
    )


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    key_mask: Tensor | None,
    grid: Sequence[int],
    heads: int,
    window: Sequence[int],
) -> Tensor:
    """Return the output `[B, L, D]`."""
    out = empty_like(query)
    if not query.shape[0]:
        return out
    layout = Layout(grid, heads, window)
    with on_device(query):
        launch(
            neighbor_attention_forward_kernel,
            (query.shape[0] * heads,),
            _plan(query, layout).num_warps,
            1,
            out_ptr=out,
            **_common(_ready((query, key, value, pad_key, pad_value, key_mask)), layout),
        )
    return out


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    key_mask: Tensor | None,
    grid: Sequence[int],
    heads: int,
    window: Sequence[int],
) -> Gradients:
    """Return the gradients of query, key, value and both pads; one of a tensor that is not there has no elements."""
    gradients = _empty_gradients(query, key, value, pad_key, pad_value)
    grad_query, grad_key, grad_value, grad_pad_key, grad_pad_value = gradients
    B, _, D = query.shape
    if not B:
        grad_pad_key.zero_()
        grad_pad_value.zero_()
        return gradients
    layout = Layout(grid, heads, window)
    parts = None if pad_key is None else query.new_empty((B, 2, D), dtype=torch.float32)
    grads = _strided(grad_out)
    with on_device(query):
        launch(
            neighbor_attention_backward_kernel,
            (B * heads,),
            _plan(query, layout).num_warps,
            1,
            grad_out_ptr=grads,
            grad_query_ptr=grad_query,
            grad_key_ptr=grad_key,
            grad_value_ptr=grad_key if value is None else grad_value,
            grad_pads_ptr=parts,
            stride_grad_out_b=grads.stride(0),
            stride_grad_out_l=grads.stride(1),
            stride_grad_k_l=key.shape[2],
            **_common(_ready((query, key, value, pad_key, pad_value, key_mask)), layout),
        )
        if parts is not None:
            sum_parts(parts, grad_pad_key, None if value is None else grad_pad_value)
    return gradients


def _forward_fake(query: Tensor, *_: object) -> Tensor:
    return empty_like(query)


def _empty_gradients(
    query: Tensor, key: Tensor, value: Tensor | None, pad_key: Tensor | None, pad_value: Tensor | None
) -> Gradients:
    """Return the results of `attention_backward`, uninitialized."""
    value, pad_key, pad_value = (
        query.new_empty(0) if x is None else empty_like(x) for x in (value, pad_key, pad_value)
    )
    return empty_like(query), empty_like(key), value, pad_key, pad_value


def _backward_fake(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    *_: object,
) -> Gradients:
    return _empty_gradients(query, key, value, pad_key, pad_value)


_INPUTS = (
    "Tensor query, Tensor key, Tensor? value, Tensor? pad_key, Tensor? pad_value, Tensor? key_mask, "
    "int[] grid, int heads, int[] window"
)
_forward_op = register(f"neighbor_attention({_INPUTS}) -> Tensor", attention_forward, _forward_fake)
_backward_op = register(
    f"neighbor_attention_backward(Tensor grad_out, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    attention_backward,
    _backward_fake,
)


class _NeighborAttention(torch.autograd.Function):
    """The forward op with the backward op as its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        pad_key: Tensor | None,
        pad_value: Tensor | None,
        key_mask: Tensor | None,
        layout: Layout,
    ) -> Tensor:
        tensors = (query, key, value, pad_key, pad_value, key_mask)
        ctx.save_for_backward(*tensors)
        ctx.layout = layout
        return _forward_op(*tensors, *layout)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx.layout, grad_out, *ctx.saved_tensors), None


def _gradients(layout: Layout, grad_out: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of the six tensors."""
    gradients = run_backward("neighbor_attention", _backward_op, grad_out, *tensors, *layout)
    return *(None if x is None else gradient for x, gradient in zip(tensors, gradients)), None


def neighbor_attention_fused(tensors: Tensors, layout: Layout) -> Tensor:
    """Compute the op of `op.py`, whose checks are done, by the kernels."""
    if needs_gradient(*tensors):
        return _NeighborAttention.apply(*tensors, layout)
    return _forward_op(*tensors, *layout)


def passes(layout: Layout) -> Passes:
    """Return the host code that a handle records."""

    def forward(*tensors: Any) -> tuple[Tensor | None, ...]:
        return attention_forward(*tensors, *layout), *tensors  # type: ignore[call-arg]

    def backward(*tensors: Any) -> tuple[Tensor | None, ...]:
        return *attention_backward(*tensors, *layout), None  # type: ignore[call-arg]

    return forward, backward, functools.partial(_gradients, layout)

"""Launchers and gradient of neighbor attention."""

from typing import Any

import torch
from torch import Tensor

from simsid.kernels.attention.kernels import neighbor_attention_backward_kernel, neighbor_attention_forward_kernel
from simsid.kernels.attention.plan import plan_grid
from simsid.kernels.launch import launch, on_device
from simsid.kernels.library import needs_gradient, register, run_backward


def _strided(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy where its last axis is strided, its start unaligned or 32-bit offsets too short.

    The vector width of the loads, and with it the order of the sums, follows the alignment: without the copy the bits
    of an image would depend on where in a larger batch it starts.
    """
    if tensor.stride(2) == 1 and tensor.shape[1] * tensor.stride(1) < 2**31:
        return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    rows: int,
    columns: int,
    heads: int,
) -> Tensor:
    """Return the output `[B, L, D]`."""
    B, L, D = query.shape
    out = query.new_empty((B, L, D))
    if not B:
        return out
    plan = plan_grid(L, D // heads, query.element_size())
    query, key, value = _strided(query), _strided(key), _strided(value)
    with on_device(query):
        launch(
            neighbor_attention_forward_kernel,
            (B * heads,),
            plan.num_warps,
            1,
            query_ptr=query,
            key_ptr=key,
            value_ptr=value,
            pad_key_ptr=None if pad_key is None else pad_key.contiguous(),
            pad_value_ptr=None if pad_value is None else pad_value.contiguous(),
            out_ptr=out,
            heads=heads,
            scale=(D // heads) ** -0.5,
            stride_q_b=query.stride(0),
            stride_q_l=query.stride(1),
            stride_k_b=key.stride(0),
            stride_k_l=key.stride(1),
            stride_v_b=value.stride(0),
            stride_v_l=value.stride(1),
            ROWS=rows,
            COLUMNS=columns,
            WIDTH=D // heads,
            HAS_PAD=pad_key is not None,
            BLOCK_L=plan.block_l,
            BLOCK_W=plan.block_w,
        )
    return out


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    rows: int,
    columns: int,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, and each image's part of those of the pads, `[2, B, D]`."""
    B, L, D = query.shape
    grad_query, grad_key, grad_value, grad_pads = _backward_fake(grad_out, query, key, value, pad_key)
    if not B:
        return grad_query, grad_key, grad_value, grad_pads
    plan = plan_grid(L, D // heads, query.element_size())
    grad_out, query, key, value = _strided(grad_out), _strided(query), _strided(key), _strided(value)
    with on_device(query):
        launch(
            neighbor_attention_backward_kernel,
            (B * heads,),
            plan.num_warps,
            1,
            grad_out_ptr=grad_out,
            query_ptr=query,
            key_ptr=key,
            value_ptr=value,
            pad_key_ptr=None if pad_key is None else pad_key.contiguous(),
            pad_value_ptr=None if pad_value is None else pad_value.contiguous(),
            grad_query_ptr=grad_query,
            grad_key_ptr=grad_key,
            grad_value_ptr=grad_value,
            grad_pads_ptr=None if pad_key is None else grad_pads,
            heads=heads,
            scale=(D // heads) ** -0.5,
            batch_features=B * D,
            stride_grad_out_b=grad_out.stride(0),
            stride_grad_out_l=grad_out.stride(1),
            stride_q_b=query.stride(0),
            stride_q_l=query.stride(1),
            stride_k_b=key.stride(0),
            stride_k_l=key.stride(1),
            stride_v_b=value.stride(0),
            stride_v_l=value.stride(1),
            ROWS=rows,
            COLUMNS=columns,
            WIDTH=D // heads,
            HAS_PAD=pad_key is not None,
            BLOCK_L=plan.block_l,
            BLOCK_W=plan.block_w,
        )
    return grad_query, grad_key, grad_value, grad_pads


def _forward_fake(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


def _backward_fake(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, pad_key: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, D = query.shape[0], query.shape[2]
    grad_pads = query.new_empty((2, B if pad_key is not None else 0, D), dtype=torch.float32)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), grad_pads


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? pad_key, Tensor? pad_value, int rows, int columns, int heads"
_forward_op = register(f"neighbor_attention({_INPUTS}) -> Tensor", attention_forward, _forward_fake)
_backward_op = register(
    f"neighbor_attention_backward(Tensor grad_out, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
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
        value: Tensor,
        pad_key: Tensor | None,
        pad_value: Tensor | None,
        rows: int,
        columns: int,
        heads: int,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, pad_key, pad_value)
        ctx.layout = (rows, columns, heads)
        return _forward_op(query, key, value, pad_key, pad_value, rows, columns, heads)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *_, pad_key, pad_value = ctx.saved_tensors
        *gradients, grad_pads = run_backward(
            "neighbor_attention", _backward_op, grad_out, *ctx.saved_tensors, *ctx.layout
        )
        if pad_key is None:
            return (*gradients, None, None, None, None, None)
        grad_pad_key, grad_pad_value = grad_pads.sum(1)
        return (*gradients, grad_pad_key.to(pad_key.dtype), grad_pad_value.to(pad_value.dtype), None, None, None)


def neighbor_attention_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    heads: int,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
) -> Tensor:
    """Compute the op of `op.py`, whose checks are done, by the kernels."""
    tensors = (query, key, value, pad_key, pad_value)
    if needs_gradient(*tensors):
        return _NeighborAttention.apply(*tensors, *grid, heads)
    return _forward_op(*tensors, *grid, heads)

"""Launchers and gradient of neighbor attention."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simsid.kernels.attention.kernels import neighbor_attention_backward_kernel, neighbor_attention_forward_kernel
from simsid.kernels.attention.plan import Window, plan_grid
from simsid.kernels.launch import launch, on_device
from simsid.kernels.library import needs_gradient, register, run_backward


class Launching(NamedTuple):
    """What a launch needs beside its tensors; the same for all calls of the same shapes, strides and dtypes."""

    grid: tuple[int]
    num_warps: int
    constants: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def _launching(
    shape: tuple[int, int, int],
    element_size: int,
    padded: bool,
    grid: Sequence[int],
    heads: int,
    window: Sequence[int],
    **strides: tuple[int, int, int],
) -> Launching:
    """Plan a launch; `strides` are those of the tensors whose names in the kernel they follow."""
    B, L, D = shape
    rows, columns, row_step, column_step, center = window
    plan = plan_grid(L, D // heads, element_size, Window(*window).keys)
    constants = {
        "heads": heads,
        "scale": (D // heads) ** -0.5,
        "ROWS": grid[0],
        "COLUMNS": grid[1],
        "WINDOW_ROWS": rows,
        "WINDOW_COLUMNS": columns,
        "STEP_ROWS": row_step,
        "STEP_COLUMNS": column_step,
        "CENTER": bool(center),
        "WIDTH": D // heads,
        "HAS_PAD": padded,
        "SLOTS": plan.slots,
        "BLOCK_L": plan.block_l,
        "BLOCK_W": plan.block_w,
    }
    for name, stride in strides.items():
        constants |= {f"{name}_b": stride[0], f"{name}_l": stride[1]}
    return Launching((B * heads,), plan.num_warps, constants)


def _strided(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy where its last axis is strided, its start unaligned or 32-bit offsets too short.

    The vector width of the loads, and with it the order of the sums, follows the alignment: without the copy the bits
    of an image would depend on where in a larger batch it starts.
    """
    if tensor.stride(2) == 1 and tensor.shape[1] * tensor.stride(1) < 2**31:
        return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()


def _pair(key: Tensor, value: Tensor | None) -> Sequence[Tensor]:
    """Return key and value, or their pads, which may lie side by side in the first."""
    return (key, value) if value is not None else key.chunk(2, -1)


def _pads(pad_key: Tensor | None, pad_value: Tensor | None) -> Sequence[Tensor | None]:
    return (None, None) if pad_key is None else [pad.contiguous() for pad in _pair(pad_key, pad_value)]


def _bytes(key_mask: Tensor | None) -> Tensor | None:
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


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
    out = _forward_fake(query)
    if not query.shape[0]:
        return out
    query, key, value = map(_strided, (query, *_pair(key, value)))
    pad_key, pad_value = _pads(pad_key, pad_value)
    layout = (query.shape, query.element_size(), pad_key is not None, tuple(grid), heads, tuple(window))
    strides = {"stride_q": query.stride(), "stride_k": key.stride(), "stride_v": value.stride()}
    planned = _launching(*layout, **strides)
    with on_device(query):
        launch(
            neighbor_attention_forward_kernel,
            planned.grid,
            planned.num_warps,
            1,
            query_ptr=query,
            key_ptr=key,
            value_ptr=value,
            pad_key_ptr=pad_key,
            pad_value_ptr=pad_value,
            key_mask_ptr=_bytes(key_mask),
            out_ptr=out,
            **planned.constants,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, and each image's part of those of the pads, `[2, B, D]`.

    Where key and value lie side by side their gradient does so too, and that of the value has no elements.
    """
    gradients = _backward_fake(grad_out, query, key, value, pad_key)
    B, _, D = query.shape
    if not B:
        return gradients
    grad_query, grad_key, grad_value, grad_pads = gradients
    grad_out, query, key, value = map(_strided, (grad_out, query, *_pair(key, value)))
    pad_key, pad_value = _pads(pad_key, pad_value)
    layout = (query.shape, query.element_size(), pad_key is not None, tuple(grid), heads, tuple(window))
    strides = {"stride_grad_out": grad_out.stride(), "stride_q": query.stride()}
    strides |= {"stride_k": key.stride(), "stride_v": value.stride()}
    planned = _launching(*layout, **strides)
    with on_device(query):
        launch(
            neighbor_attention_backward_kernel,
            planned.grid,
            planned.num_warps,
            1,
            grad_out_ptr=grad_out,
            query_ptr=query,
            key_ptr=key,
            value_ptr=value,
            pad_key_ptr=pad_key,
            pad_value_ptr=pad_value,
            key_mask_ptr=_bytes(key_mask),
            grad_query_ptr=grad_query,
            grad_key_ptr=grad_key,
            grad_value_ptr=grad_value if len(grad_value) else grad_key[..., D:],
            grad_pads_ptr=None if pad_key is None else grad_pads,
            batch_features=B * D,
            stride_grad_k_l=grad_key.stride(1),
            **planned.constants,
        )
    return gradients


def _forward_fake(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _backward_fake(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor | None, pad_key: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_value = query.new_empty(0) if value is None else _forward_fake(value)
    pads = (2, query.shape[0], query.shape[2]) if pad_key is not None else (0,)
    return _forward_fake(query), _forward_fake(key), grad_value, query.new_empty(pads, dtype=torch.float32)


_INPUTS = (
    "Tensor query, Tensor key, Tensor? value, Tensor? pad_key, Tensor? pad_value, Tensor? key_mask, "
    "int[] grid, int heads, int[] window"
)
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
        value: Tensor | None,
        pad_key: Tensor | None,
        pad_value: Tensor | None,
        key_mask: Tensor | None,
        *layout: Any,
    ) -> Tensor:
        tensors = (query, key, value, pad_key, pad_value, key_mask)
        ctx.save_for_backward(*tensors)
        ctx.layout = layout
        return _forward_op(*tensors, *layout)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        _, _, value, pad_key, pad_value, _ = tensors
        grad_query, grad_key, grad_value, grad_pads = run_backward(
            "neighbor_attention", _backward_op, grad_out, *tensors, *ctx.layout
        )
        grad_value = None if value is None else grad_value
        if pad_key is None:
            return grad_query, grad_key, grad_value, *(None,) * 6
        grad_pads = grad_pads.sum(1)
        if pad_value is None:
            return grad_query, grad_key, grad_value, grad_pads.flatten().to(pad_key.dtype), *(None,) * 5
        grad_pad_key, grad_pad_value = grad_pads.unbind()
        pads = grad_pad_key.to(pad_key.dtype), grad_pad_value.to(pad_value.dtype)
        return grad_query, grad_key, grad_value, *pads, *(None,) * 4


def neighbor_attention_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    key_mask: Tensor | None,
    grid: tuple[int, int],
    heads: int,
    window: Window,
) -> Tensor:
    """Compute the op of `op.py`, whose checks are done, by the kernels."""
    tensors = (query, key, value, pad_key, pad_value, key_mask)
    if needs_gradient(query, key, value, pad_key, pad_value):
        return _NeighborAttention.apply(*tensors, grid, heads, window)
    return _forward_op(*tensors, grid, heads, window)

"""Launchers and gradient of neighbor attention."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simsid.kernels.attention.kernels import neighbor_attention_backward_kernel, neighbor_attention_forward_kernel
from simsid.kernels.attention.plan import plan_grid
from simsid.kernels.launch import Plan, launch, on_device
from simsid.kernels.library import aligned, empty_like, needs_gradient, register, run_backward, usable, watched

# query, key, value, pad_key, pad_value, key_mask
Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Layout(NamedTuple):
    """Everything of a call that is not a tensor."""

    grid: Sequence[int]
    heads: int
    window: Sequence[int]  # the fields of a `Window`


class Handle(NamedTuple):
    """A call whose arguments were checked and whose tensors need no copy, planned forward and backward."""

    layout: Layout
    forward: Plan
    backward: Plan  # for a contiguous gradient of the output

    def launch(self, tensors: Tensors) -> Tensor:
        """Compute the op; take the long way where a tensor does not start at a multiple of 16 bytes."""
        query, key, value, *_ = tensors
        if not aligned(query, key) or not (value is None or aligned(value)):
            return neighbor_attention_fused(tensors, self.layout)
        if needs_gradient(*tensors):
            return _NeighborAttention.apply(*tensors, self.layout, self)
        return _launch_forward(self.forward, *tensors)


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, int, int],
    element_size: int,
    padded: bool,
    packed: bool,
    layout: Layout,
    **strides: tuple[int, int, int],
) -> Plan:
    """Plan a launch; `strides` are those of the tensors whose names in the kernel they follow.

    With `packed` values lie behind their keys in one tensor, and so do their pads and gradients.
    """
    B, L, D = shape
    grid, heads, (rows, columns, row_step, column_step, center) = layout
    tile = plan_grid(L, D // heads, element_size, rows * columns - 1 + center)
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
        "BEHIND": D if packed else 0,
        "HAS_PAD": padded,
        "SLOTS": tile.slots,
        "BLOCK_L": tile.block_l,
        "BLOCK_W": tile.block_w,
    }
    for name, stride in strides.items():
        constants |= {f"{name}_b": stride[0], f"{name}_l": stride[1]}
    return Plan((B * heads,), tile.num_warps, 1, constants)


def _facts(query: Tensor, value: Tensor | None, pad_key: Tensor | None, layout: Layout) -> tuple[Any, ...]:
    return query.shape, query.element_size(), pad_key is not None, value is None, layout


def _plan_forward(query: Tensor, key: Tensor, value: Tensor | None, pad_key: Tensor | None, layout: Layout) -> Plan:
    strides = {
        "stride_q": query.stride(),
        "stride_k": key.stride(),
        "stride_v": (key if value is None else value).stride(),
    }
    return _plan(*_facts(query, value, pad_key, layout), **strides)


def _plan_backward(
    grad_stride: tuple[int, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    pad_key: Tensor | None,
    layout: Layout,
) -> Plan:
    strides = {
        "stride_q": query.stride(),
        "stride_k": key.stride(),
        "stride_v": (key if value is None else value).stride(),
    }
    plan = _plan(*_facts(query, value, pad_key, layout), stride_grad_out=grad_stride, **strides)
    B, _, D = query.shape
    return plan._replace(constants=plan.constants | {"batch_features": B * D, "stride_grad_k_l": key.shape[2]})


def _strided(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy where its last axis is strided, its start unaligned or 32-bit offsets too short.

    The vector width of the loads, and with it the order of the sums, follows the alignment: without the copy the bits
    of an image would depend on where in a larger batch it starts.
    """
    if tensor.stride(2) == 1 and tensor.shape[1] * tensor.stride(1) < 2**31:
        return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()


def _contiguous(pad: Tensor | None) -> Tensor | None:
    return None if pad is None else pad.contiguous()


def _bytes(key_mask: Tensor | None) -> Tensor | None:
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


def _launch_forward(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    """Launch on tensors that need no copy."""
    out = empty_like(query)
    with on_device(query):
        launch(
            neighbor_attention_forward_kernel,
            plan.grid,
            plan.num_warps,
            plan.num_stages,
            query_ptr=query,
            key_ptr=key,
            value_ptr=key if value is None else value,
            pad_key_ptr=pad_key,
            pad_value_ptr=pad_key if value is None else pad_value,
            key_mask_ptr=key_mask,
            out_ptr=out,
            **plan.constants,
        )
    return out


def _launch_backward(
    plan: Plan,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Launch on tensors that need no copy; there is a gradient for whatever is not None."""
    gradients = _empty_gradients(query, key, value, pad_key)
    grad_query, grad_key, grad_value, grad_pads = gradients
    with on_device(query):
        launch(
            neighbor_attention_backward_kernel,
            plan.grid,
            plan.num_warps,
            plan.num_stages,
            grad_out_ptr=grad_out,
            query_ptr=query,
            key_ptr=key,
            value_ptr=key if value is None else value,
            pad_key_ptr=pad_key,
            pad_value_ptr=pad_key if value is None else pad_value,
            key_mask_ptr=key_mask,
            grad_query_ptr=grad_query,
            grad_key_ptr=grad_key,
            grad_value_ptr=grad_key if value is None else grad_value,
            grad_pads_ptr=grad_pads,
            **plan.constants,
        )
    return gradients


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
    if not query.shape[0]:
        return empty_like(query)
    query, key, value = _strided(query), _strided(key), None if value is None else _strided(value)
    layout = Layout(tuple(grid), heads, tuple(window))
    plan = _plan_forward(query, key, value, pad_key, layout)
    pads = _contiguous(pad_key), _contiguous(pad_value)
    return _launch_forward(plan, query, key, value, *pads, _bytes(key_mask))


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

    Where values lie behind their keys their gradient does so too, and that of the value has no elements.
    """
    if not query.shape[0]:
        return _backward_fake(grad_out, query, key, value, pad_key)
    grad_out, query, key = _strided(grad_out), _strided(query), _strided(key)
    value = None if value is None else _strided(value)
    layout = Layout(tuple(grid), heads, tuple(window))
    plan = _plan_backward(grad_out.stride(), query, key, value, pad_key, layout)
    pads = _contiguous(pad_key), _contiguous(pad_value)
    return _filled(query, _launch_backward(plan, grad_out, query, key, value, *pads, _bytes(key_mask)))


def _forward_fake(query: Tensor, *_: object) -> Tensor:
    return empty_like(query)


def _empty_gradients(
    query: Tensor, key: Tensor, value: Tensor | None, pad_key: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    pads = None
    if pad_key is not None:
        pads = query.new_empty((2, query.shape[0], query.shape[2]), dtype=torch.float32)
    return empty_like(query), empty_like(key), None if value is None else empty_like(value), pads


def _filled(
    query: Tensor, gradients: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put empty tensors in place of gradients that are None, which an op cannot return."""
    grad_query, grad_key, *others = gradients
    grad_value, grad_pads = (
        query.new_empty(0, dtype=dtype) if x is None else x for x, dtype in zip(others, (query.dtype, torch.float32))
    )
    return grad_query, grad_key, grad_value, grad_pads


def _backward_fake(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor | None, pad_key: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _filled(query, _empty_gradients(query, key, value, pad_key))


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
    """The forward op with the backward op as its gradient; with a handle, their launches alone."""

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
        handle: Handle | None,
    ) -> Tensor:
        tensors = (query, key, value, pad_key, pad_value, key_mask)
        ctx.save_for_backward(*tensors)
        ctx.layout, ctx.handle = layout, handle
        if handle is None:
            return _forward_op(*tensors, *layout)
        return _launch_forward(handle.forward, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        _, _, value, pad_key, pad_value, _ = tensors
        handle = ctx.handle
        if handle is None or torch.is_grad_enabled() or not usable(grad_out) or watched(grad_out):
            grad_query, grad_key, grad_value, grad_pads = run_backward(
                "neighbor_attention", _backward_op, grad_out, *tensors, *ctx.layout
            )
        else:
            grad_query, grad_key, grad_value, grad_pads = _launch_backward(handle.backward, grad_out, *tensors)
        grad_value = None if value is None else grad_value
        if pad_key is None:
            return grad_query, grad_key, grad_value, None, None, None, None, None
        grad_pads = grad_pads.sum(1)
        if pad_value is None:
            return grad_query, grad_key, grad_value, grad_pads.flatten().to(pad_key.dtype), None, None, None, None
        pads = grad_pads.unbind()
        if pad_key.dtype != torch.float32 or pad_value.dtype != torch.float32:
            pads = pads[0].to(pad_key.dtype), pads[1].to(pad_value.dtype)
        return grad_query, grad_key, grad_value, *pads, None, None, None


def neighbor_attention_fused(tensors: Tensors, layout: Layout) -> Tensor:
    """Compute the op of `op.py`, whose checks are done, by the kernels."""
    if needs_gradient(*tensors):
        return _NeighborAttention.apply(*tensors, layout, None)
    return _forward_op(*tensors, *layout)


def make_handle(tensors: Tensors, layout: Layout) -> Handle | None:
    """Plan the calls with tensors like these; None where a call has to prepare its tensors."""
    query, key, value, pad_key, pad_value, key_mask = tensors
    inputs = [query, key] if value is None else [query, key, value]
    pads = [pad for pad in (pad_key, pad_value) if pad is not None]
    if (
        key_mask is not None
        or not query.numel()
        or not all(x.stride(2) == 1 and x.shape[1] * x.stride(1) < 2**31 for x in inputs)
        or not all(pad.is_contiguous() for pad in pads)
    ):
        return None
    contiguous = (query.shape[1] * query.shape[2], query.shape[2], 1)
    return Handle(
        layout,
        _plan_forward(query, key, value, pad_key, layout),
        _plan_backward(contiguous, query, key, value, pad_key, layout),
    )

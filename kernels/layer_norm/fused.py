"""Launchers and gradient of residual + LayerNorm + ReLU."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simsid.kernels.launch import Plan, launch, on_device
from simsid.kernels.layer_norm.kernels import residual_layer_norm_backward_kernel, residual_layer_norm_forward_kernel
from simsid.kernels.layer_norm.plan import plan_parts, plan_row
from simsid.kernels.library import aligned, empty_like, needs_gradient, register, run_backward, usable, watched


def _rows(tensor: Tensor) -> Tensor:
    """Return `[R, D]` with adjacent features and an aligned start, on which the order of a row's sum depends."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    if rows.stride(1) != 1:
        return rows.contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.clone(memory_format=torch.contiguous_format)


class Handle(NamedTuple):
    """A call whose arguments were checked and whose tensors need no copy, planned forward and backward."""

    forward: Plan
    backward: Plan  # for a contiguous gradient of the output

    def launch(self, tensors: tuple[Tensor, Tensor, Tensor, Tensor], eps: float) -> Tensor:
        """Compute the op; take the long way where a tensor does not start at a multiple of 16 bytes."""
        x, residual, *_ = tensors
        if not aligned(x, residual):
            return residual_layer_norm_fused(*tensors, eps)
        if needs_gradient(*tensors):
            return _ResidualLayerNorm.apply(*tensors, eps, self)
        return _launch_forward(self.forward, *tensors, eps)[0]


@functools.lru_cache(maxsize=1024)
def _plan_forward(rows: int, features: int, stride_x: int, stride_residual: int) -> Plan:
    tile = plan_row(features)
    constants = {"stride_x_r": stride_x, "stride_residual_r": stride_residual, "D": features, "BLOCK_D": tile.block_d}
    return Plan((rows,), tile.num_warps, 1, constants)


@functools.lru_cache(maxsize=1024)
def _plan_backward(rows: int, features: int, stride_grad_out: int, stride_x: int) -> Plan:
    tile, sums = plan_row(features), plan_parts(rows)
    constants = {
        "rows": rows,
        "rows_per_program": sums.rows_per_program,
        "stride_grad_out_r": stride_grad_out,
        "stride_x_r": stride_x,
        "D": features,
        "BLOCK_D": tile.block_d,
    }
    return Plan((sums.parts,), tile.num_warps, 1, constants)


def _launch_forward(
    plan: Plan, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Launch on tensors that need no copy; only strides of their rows may count."""
    out, statistics = _forward_fake(x, residual, weight)
    with on_device(x):
        launch(
            residual_layer_norm_forward_kernel,
            plan.grid,
            plan.num_warps,
            plan.num_stages,
            x_ptr=x,
            residual_ptr=residual,
            weight_ptr=weight,
            bias_ptr=bias,
            out_ptr=out,
            statistics_ptr=statistics,
            eps=eps,
            **plan.constants,
        )
    return out, statistics


def _launch_backward(
    plan: Plan,
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    statistics: Tensor,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch on tensors that need no copy."""
    gradients = _empty_gradients(x, residual_dtype, plan.grid[0])
    grad_x, grad_residual, grad_parts = gradients
    with on_device(x):
        launch(
            residual_layer_norm_backward_kernel,
            plan.grid,
            plan.num_warps,
            plan.num_stages,
            grad_out_ptr=grad_out,
            x_ptr=x,
            weight_ptr=weight,
            out_ptr=out,
            statistics_ptr=statistics,
            grad_x_ptr=grad_x,
            grad_residual_ptr=grad_residual,
            grad_parts_ptr=grad_parts,
            **plan.constants,
        )
    return gradients


def layer_norm_forward(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the output and, for the backward, mean and reciprocal deviation of every row `[R, 2]`."""
    if not x.numel():
        return _forward_fake(x, residual, weight)
    rows, others = _rows(x), _rows(residual)
    plan = _plan_forward(*rows.shape, rows.stride(0), others.stride(0))
    out, statistics = _launch_forward(plan, rows, others, weight.contiguous(), bias.contiguous(), eps)
    return out.view(x.shape), statistics


def layer_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, out: Tensor, statistics: Tensor, residual_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x and residual, and the parts `[parts, 2, D]` of those of weight and bias."""
    if not x.numel():
        return _backward_fake(grad_out, x, weight, out, statistics, residual_dtype)
    grads, rows = _rows(grad_out), _rows(x)
    plan = _plan_backward(*rows.shape, grads.stride(0), rows.stride(0))
    grad_x, grad_residual, grad_parts = _launch_backward(
        plan, grads, rows, weight.contiguous(), out, statistics, residual_dtype
    )
    return grad_x.view(x.shape), grad_residual.view(x.shape), grad_parts


def _forward_fake(x: Tensor, residual: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    if x.dtype == residual.dtype:
        out = empty_like(x)
    else:
        out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return out, x.new_empty((x.numel() // x.shape[-1], 2), dtype=torch.float32)


def _empty_gradients(x: Tensor, residual_dtype: torch.dtype, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    grad_residual = empty_like(x) if x.dtype == residual_dtype else x.new_empty(x.shape, dtype=residual_dtype)
    return empty_like(x), grad_residual, x.new_empty((parts, 2, x.shape[-1]), dtype=torch.float32)


def _backward_fake(
    grad_out: Tensor, x: Tensor, weight: Tensor, out: Tensor, statistics: Tensor, residual_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(x, residual_dtype, plan_parts(statistics.shape[0]).parts)


_forward_op = register(
    "residual_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    layer_norm_forward,
    _forward_fake,
)
_backward_op = register(
    "residual_layer_norm_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor out, Tensor statistics, "
    "ScalarType residual_dtype) -> (Tensor, Tensor, Tensor)",
    layer_norm_backward,
    _backward_fake,
)


class _ResidualLayerNorm(torch.autograd.Function):
    """The forward op with the backward op as its gradient; with a handle, their launches alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, handle: Handle | None
    ) -> Tensor:
        if handle is None:
            out, statistics = _forward_op(x, residual, weight, bias, eps)
        else:
            out, statistics = _launch_forward(handle.forward, x, residual, weight, bias, eps)
        ctx.save_for_backward(x, weight, out, statistics)
        ctx.dtypes, ctx.handle = (residual.dtype, bias.dtype), handle
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out, statistics = ctx.saved_tensors
        residual_dtype, bias_dtype = ctx.dtypes
        arguments = (grad_out, x, weight, out, statistics, residual_dtype)
        if ctx.handle is None or torch.is_grad_enabled() or not usable(grad_out) or watched(grad_out):
            grad_x, grad_residual, grad_parts = run_backward("residual_layer_norm", _backward_op, *arguments)
        else:
            grad_x, grad_residual, grad_parts = _launch_backward(ctx.handle.backward, *arguments)
        grad_weight, grad_bias = grad_parts.sum(0).unbind()
        if weight.dtype != torch.float32 or bias_dtype != torch.float32:
            grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(bias_dtype)
        return grad_x, grad_residual, grad_weight, grad_bias, None, None


def residual_layer_norm_fused(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute the op of `op.py`, whose checks are done, by the kernels."""
    if needs_gradient(x, residual, weight, bias):
        return _ResidualLayerNorm.apply(x, residual, weight, bias, eps, None)
    return _forward_op(x, residual, weight, bias, eps)[0]


def make_handle(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Handle | None:
    """Plan the calls with tensors like these; None where a call has to prepare its tensors."""
    if not x.numel() or not all(tensor.is_contiguous() for tensor in (x, residual, weight, bias)):
        return None
    D = x.shape[-1]
    R = x.numel() // D
    return Handle(_plan_forward(R, D, D, D), _plan_backward(R, D, D, D))

"""Launchers and gradient of residual + LayerNorm + ReLU."""

from typing import Any

import torch
from torch import Tensor

from simsid.kernels.launch import launch, on_device
from simsid.kernels.layer_norm.kernels import residual_layer_norm_backward_kernel, residual_layer_norm_forward_kernel
from simsid.kernels.layer_norm.plan import plan_parts, plan_row
from simsid.kernels.library import needs_gradient, register, run_backward


def _rows(tensor: Tensor) -> Tensor:
    """Return `[R, D]` with adjacent features and an aligned start, on which the order of a row's sum depends."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    if rows.stride(1) != 1:
        return rows.contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.clone(memory_format=torch.contiguous_format)


def layer_norm_forward(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the output and, for the backward, mean and reciprocal deviation of every row `[R, 2]`."""
    D = x.shape[-1]
    R = x.numel() // D
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    statistics = torch.empty((R, 2), dtype=torch.float32, device=x.device)
    if not R:
        return out, statistics
    plan = plan_row(D)
    x, residual = _rows(x), _rows(residual)
    with on_device(x):
        launch(
            residual_layer_norm_forward_kernel,
            (R,),
            plan.num_warps,
            1,
            x_ptr=x,
            residual_ptr=residual,
            weight_ptr=weight.contiguous(),
            bias_ptr=bias.contiguous(),
            out_ptr=out,
            statistics_ptr=statistics,
            eps=eps,
            stride_x_r=x.stride(0),
            stride_residual_r=residual.stride(0),
            D=D,
            BLOCK_D=plan.block_d,
        )
    return out, statistics


def layer_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, out: Tensor, statistics: Tensor, residual_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x and residual, and the parts `[parts, 2, D]` of those of weight and bias."""
    D = x.shape[-1]
    R = x.numel() // D
    row, sums = plan_row(D), plan_parts(R)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_residual = torch.empty(x.shape, dtype=residual_dtype, device=x.device)
    grad_parts = torch.empty((sums.parts, 2, D), dtype=torch.float32, device=x.device)
    if not R:
        return grad_x, grad_residual, grad_parts
    grad_out, x = _rows(grad_out), _rows(x)
    with on_device(x):
        launch(
            residual_layer_norm_backward_kernel,
            (sums.parts,),
            row.num_warps,
            1,
            grad_out_ptr=grad_out,
            x_ptr=x,
            weight_ptr=weight.contiguous(),
            out_ptr=out,
            statistics_ptr=statistics,
            grad_x_ptr=grad_x,
            grad_residual_ptr=grad_residual,
            grad_parts_ptr=grad_parts,
            rows=R,
            rows_per_program=sums.rows_per_program,
            stride_grad_out_r=grad_out.stride(0),
            stride_x_r=x.stride(0),
            D=D,
            BLOCK_D=row.block_d,
        )
    return grad_x, grad_residual, grad_parts


def _forward_fake(x: Tensor, residual: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return out, x.new_empty((x.numel() // x.shape[-1], 2), dtype=torch.float32)


def _backward_fake(
    grad_out: Tensor, x: Tensor, weight: Tensor, out: Tensor, statistics: Tensor, residual_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    parts = plan_parts(statistics.shape[0]).parts
    grad_parts = x.new_empty((parts, 2, x.shape[-1]), dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=residual_dtype), grad_parts


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
    """The forward op with the backward op as its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out, statistics = _forward_op(x, residual, weight, bias, eps)
        ctx.save_for_backward(x, weight, out, statistics)
        ctx.dtypes = (residual.dtype, bias.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out, statistics = ctx.saved_tensors
        residual_dtype, bias_dtype = ctx.dtypes
        grad_x, grad_residual, grad_parts = run_backward(
            "residual_layer_norm", _backward_op, grad_out, x, weight, out, statistics, residual_dtype
        )
        grad_weight, grad_bias = grad_parts.sum(0)
        return grad_x, grad_residual, grad_weight.to(weight.dtype), grad_bias.to(bias_dtype), None


def residual_layer_norm_fused(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute the op of `op.py`, whose checks are done, by the kernels."""
    if needs_gradient(x, residual, weight, bias):
        return _ResidualLayerNorm.apply(x, residual, weight, bias, eps)
    return _forward_op(x, residual, weight, bias, eps)[0]

"""Launchers and gradient of residual + LayerNorm + ReLU."""

import functools
from typing import Any

import torch
from torch import Tensor

from simsid.kernels.handles import Passes
from simsid.kernels.launch import launch, on_device
from simsid.kernels.layer_norm.kernels import residual_layer_norm_backward_kernel, residual_layer_norm_forward_kernel
from simsid.kernels.layer_norm.plan import plan_parts, plan_row
from simsid.kernels.library import empty_like, needs_gradient, register, run_backward
from simsid.kernels.sums.launchers import sum_parts

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def _rows(tensor: Tensor) -> Tensor:
    """Return `[R, D]` with adjacent features and an aligned start, on which the order of a row's sum depends."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    if rows.stride(1) != 1:
        return rows.contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.clone(memory_format=torch.contiguous_format)


def layer_norm_forward(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the output and, for the backward, mean and reciprocal deviation of every row `[R, 2]`."""
    out, statistics = _empty_results(x, residual)
    if not x.numel():
        return out, statistics
    rows, others = _rows(x), _rows(residual)
    R, D = rows.shape
    tile = plan_row(D)
    with on_device(x):
        launch(
            residual_layer_norm_forward_kernel,
            (R,),
            tile.num_warps,
            1,
            x_ptr=rows,
            residual_ptr=others,
            weight_ptr=weight.contiguous(),
            bias_ptr=bias.contiguous(),
            out_ptr=out,
            statistics_ptr=statistics,
            eps=eps,
            stride_x_r=rows.stride(0),
            stride_residual_r=others.stride(0),
            D=D,
            BLOCK_D=tile.block_d,
        )
    return out, statistics


def layer_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    statistics: Tensor,
    residual_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> Gradients:
    """Return the gradients of x, residual, weight and bias."""
    gradients = _empty_gradients(x, weight, residual_dtype, bias_dtype)
    grad_x, grad_residual, grad_weight, grad_bias = gradients
    if not x.numel():
        return grad_x, grad_residual, grad_weight.zero_(), grad_bias.zero_()
    grads, rows = _rows(grad_out), _rows(x)
    R, D = rows.shape
    tile, sums = plan_row(D), plan_parts(R)
    grad_parts = x.new_empty((sums.parts, 2, D), dtype=torch.float32)
    with on_device(x):
        launch(
            residual_layer_norm_backward_kernel,
            (sums.parts,),
            tile.num_warps,
            1,
            grad_out_ptr=grads,
            x_ptr=rows,
            weight_ptr=weight.contiguous(),
            out_ptr=out,
            statistics_ptr=statistics,
            grad_x_ptr=grad_x,
            grad_residual_ptr=grad_residual,
            grad_parts_ptr=grad_parts,
            rows=R,
            rows_per_program=sums.rows_per_program,
            stride_grad_out_r=grads.stride(0),
            stride_x_r=rows.stride(0),
            D=D,
            BLOCK_D=tile.block_d,
        )
        sum_parts(grad_parts, grad_weight, grad_bias)
    return gradients


def _empty_results(x: Tensor, residual: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Return the results of `layer_norm_forward`, uninitialized."""
    if x.dtype == residual.dtype:
        out = empty_like(x)
    else:
        out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return out, x.new_empty((x.numel() // x.shape[-1], 2), dtype=torch.float32)


def _empty_gradients(x: Tensor, weight: Tensor, residual_dtype: torch.dtype, bias_dtype: torch.dtype) -> Gradients:
    """Return the results of `layer_norm_backward`, uninitialized."""
    return (
        empty_like(x),
        x.new_empty(x.shape, dtype=residual_dtype),
        empty_like(weight),
        weight.new_empty(weight.shape, dtype=bias_dtype),
    )


def _backward_fake(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    statistics: Tensor,
    residual_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> Gradients:
    return _empty_gradients(x, weight, residual_dtype, bias_dtype)


_forward_op = register(
    "residual_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    layer_norm_forward,
    _empty_results,
)
_backward_op = register(
    "residual_layer_norm_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor out, Tensor statistics, "
    "ScalarType residual_dtype, ScalarType bias_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
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
        return *_gradients(*ctx.dtypes, grad_out, *ctx.saved_tensors), None


def _gradients(residual_dtype: torch.dtype, bias_dtype: torch.dtype, grad_out: Tensor, *saved: Tensor) -> Gradients:
    return run_backward("residual_layer_norm", _backward_op, grad_out, *saved, residual_dtype, bias_dtype)


def residual_layer_norm_fused(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute the op of `op.py`, whose checks are done, by the kernels."""
    if needs_gradient(x, residual, weight, bias):
        return _ResidualLayerNorm.apply(x, residual, weight, bias, eps)
    return _forward_op(x, residual, weight, bias, eps)[0]


def passes(residual_dtype: torch.dtype, bias_dtype: torch.dtype, eps: float) -> Passes:
    """Return the host code that a handle records."""

    def forward(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        out, statistics = layer_norm_forward(x, residual, weight, bias, eps)
        return out, x, weight, out, statistics

    def backward(*tensors: Tensor) -> Gradients:
        return layer_norm_backward(*tensors, residual_dtype, bias_dtype)  # type: ignore[call-arg, arg-type]

    return forward, backward, functools.partial(_gradients, residual_dtype, bias_dtype)

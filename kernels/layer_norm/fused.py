"""LayerNorm + residual + ReLU in Triton: one launch forward, one backward and one sum over its parts.

    n = (x - mean) * rstd          out = relu(n * weight + bias + residual)
    g = dout where out > 0         dresidual = g        dbias = sum_rows g        dweight = sum_rows g n
    dx = rstd (g w - mean(g w) - n mean(g w n))

A program holds a row in registers, so that x is read once: 3 rows of traffic forward, 5 backward. The sums over rows
are made in a fixed order: each of at most PARTS backward programs adds up its own rows, PyTorch adds the parts. Both
kernels are bound by bandwidth, and at the in-painting block's 256 rows by the launch. Above MAX_FEATURES a row does not
fit in registers.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from simsid.kernels.launch import launch, on_device

PARTS = 128  # about one program an SM; more parts cost more bytes than the shorter loops save


@triton.jit
def _load(p, m):
    """Load zeros where masked, as float32 at once: the interpreter's bf16 arithmetic is that of raw bits."""
    return tl.load(p, mask=m, other=0.0).to(tl.float32)


@triton.jit
def residual_layer_norm_forward_kernel(
    x_ptr,  # (R, D)
    residual_ptr,  # (R, D)
    weight_ptr,  # (D)
    bias_ptr,  # (D)
    out_ptr,  # (R, D), contiguous
    statistics_ptr,  # (R, 2) float32: mean and 1 / standard deviation
    eps,
    stride_x,
    stride_r,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_x = _load(x_ptr + i_row * stride_x + o_d, m_d)
    mean = tl.sum(b_x, axis=0) / D
    b_x = tl.where(m_d, b_x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(b_x * b_x, axis=0) / D + eps)
    b_y = b_x * rstd * _load(weight_ptr + o_d, m_d) + _load(bias_ptr + o_d, m_d)
    b_y += _load(residual_ptr + i_row * stride_r + o_d, m_d)
    b_y = tl.where(b_y <= 0.0, 0.0, b_y)  # unlike a maximum, this lets a NaN through
    tl.store(out_ptr + i_row * D + o_d, b_y.to(out_ptr.dtype.element_ty), mask=m_d)
    tl.store(statistics_ptr + 2 * i_row, mean)
    tl.store(statistics_ptr + 2 * i_row + 1, rstd)


@triton.jit
def residual_layer_norm_backward_kernel(
    grad_ptr,  # (R, D)
    x_ptr,  # (R, D)
    weight_ptr,  # (D)
    out_ptr,  # (R, D), contiguous
    statistics_ptr,  # (R, 2)
    grad_x_ptr,  # (R, D), contiguous
    grad_residual_ptr,  # (R, D), contiguous
    parts_ptr,  # (programs, 2, D) float32: each program's rows' part of the gradients to weight and bias
    rows,
    rows_per_program,
    stride_g,
    stride_x,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_part = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_weight = _load(weight_ptr + o_d, m_d)
    b_dweight = tl.zeros((BLOCK_D,), tl.float32)
    b_dbias = tl.zeros((BLOCK_D,), tl.float32)
    first = i_part * rows_per_program
    for i_row in range(first, tl.minimum(first + rows_per_program, rows)):
        mean = tl.load(statistics_ptr + 2 * i_row)
        rstd = tl.load(statistics_ptr + 2 * i_row + 1)
        b_out = _load(out_ptr + i_row * D + o_d, m_d)
        b_g = tl.where(b_out <= 0.0, 0.0, _load(grad_ptr + i_row * stride_g + o_d, m_d))
        b_n = tl.where(m_d, (_load(x_ptr + i_row * stride_x + o_d, m_d) - mean) * rstd, 0.0)
        b_dweight += b_g * b_n
        b_dbias += b_g
        tl.store(grad_residual_ptr + i_row * D + o_d, b_g.to(grad_residual_ptr.dtype.element_ty), mask=m_d)
        b_g *= b_weight
        b_dx = rstd * (b_g - tl.sum(b_g, axis=0) / D - b_n * (tl.sum(b_g * b_n, axis=0) / D))
        tl.store(grad_x_ptr + i_row * D + o_d, b_dx.to(grad_x_ptr.dtype.element_ty), mask=m_d)
    tl.store(parts_ptr + 2 * i_part * D + o_d, b_dweight, mask=m_d)
    tl.store(parts_ptr + (2 * i_part + 1) * D + o_d, b_dbias, mask=m_d)


def plan(features: int) -> tuple[int, int]:
    """Return the block and the warps of a row: 8 features a thread, 16 warps at most (16 features a thread at 8192)."""
    block = triton.next_power_of_2(features)
    return block, max(1, min(16, block // 256))


def _rows(tensor: Tensor) -> Tensor:
    """Return `[R, D]` with adjacent features and an aligned start, on which the order of a row's sum depends."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    if rows.stride(1) != 1:
        return rows.contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.clone(memory_format=torch.contiguous_format)


def _forward(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    D = x.shape[-1]
    rows = x.numel() // D
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    statistics = torch.empty((rows, 2), dtype=torch.float32, device=x.device)
    if not rows:
        return out, statistics
    block, num_warps = plan(D)
    x, residual = _rows(x), _rows(residual)
    with on_device(x):
        launch(
            residual_layer_norm_forward_kernel,
            (rows,),
            num_warps=num_warps,
            num_stages=1,
            x_ptr=x,
            residual_ptr=residual,
            weight_ptr=weight.contiguous(),
            bias_ptr=bias.contiguous(),
            out_ptr=out,
            statistics_ptr=statistics,
            eps=eps,
            stride_x=x.stride(0),
            stride_r=residual.stride(0),
            D=D,
            BLOCK_D=block,
        )
    return out, statistics


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, out: Tensor, statistics: Tensor, residual_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    D = x.shape[-1]
    rows = x.numel() // D
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_residual = torch.empty(x.shape, dtype=residual_dtype, device=x.device)
    rows_per_program = max(1, triton.cdiv(rows, PARTS))
    parts = torch.empty((triton.cdiv(rows, rows_per_program), 2, D), dtype=torch.float32, device=x.device)
    if not rows:
        return grad_x, grad_residual, parts
    block, num_warps = plan(D)
    grad, x = _rows(grad), _rows(x)
    with on_device(x):
        launch(
            residual_layer_norm_backward_kernel,
            (parts.shape[0],),
            num_warps=num_warps,
            num_stages=1,
            grad_ptr=grad,
            x_ptr=x,
            weight_ptr=weight.contiguous(),
            out_ptr=out,
            statistics_ptr=statistics,
            grad_x_ptr=grad_x,
            grad_residual_ptr=grad_residual,
            parts_ptr=parts,
            rows=rows,
            rows_per_program=rows_per_program,
            stride_g=grad.stride(0),
            stride_x=x.stride(0),
            D=D,
            BLOCK_D=block,
        )
    return grad_x, grad_residual, parts


_library = torch.library.Library("simsid", "FRAGMENT")
for _schema in (
    "residual_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    "residual_layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor out, Tensor statistics, "
    "ScalarType residual_dtype) -> (Tensor, Tensor, Tensor)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
for _key in ("CUDA", "CPU"):
    _library.impl("residual_layer_norm", _forward, _key)
    _library.impl("residual_layer_norm_backward", _backward, _key)


@torch.library.register_fake("simsid::residual_layer_norm", lib=_library)
def _(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return out, x.new_empty((x.numel() // x.shape[-1], 2), dtype=torch.float32)


@torch.library.register_fake("simsid::residual_layer_norm_backward", lib=_library)
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    statistics: Tensor,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = statistics.shape[0]
    rows_per_program = max(1, (rows + PARTS - 1) // PARTS)
    parts = x.new_empty(((rows + rows_per_program - 1) // rows_per_program, 2, x.shape[-1]), dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=residual_dtype), parts


class _ResidualLayerNorm(torch.autograd.Function):
    """The forward op with the backward op as its gradient.

    Without `setup_context`, which torch.func would need: with it every call binds its signature anew.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        out, statistics = torch.ops.simsid.residual_layer_norm(x, residual, weight, bias, eps)
        ctx.save_for_backward(x, weight, out, statistics)
        ctx.dtypes = (residual.dtype, bias.dtype)
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out, statistics = ctx.saved_tensors
        residual_dtype, bias_dtype = ctx.dtypes
        # Gradients are on in here only under create_graph.
        backward = _Differentiable.apply if torch.is_grad_enabled() else torch.ops.simsid.residual_layer_norm_backward
        grad_x, grad_residual, parts = backward(grad, x, weight, out, statistics, residual_dtype)
        grad_weight, grad_bias = parts.sum(0)
        return grad_x, grad_residual, grad_weight.to(weight.dtype), grad_bias.to(bias_dtype), None


class _Differentiable(torch.autograd.Function):
    """The backward op in a graph of its own, where differentiating it is one clear error."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,  # noqa: ARG004
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        statistics: Tensor,
        residual_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.simsid.residual_layer_norm_backward(grad, x, weight, out, statistics, residual_dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> None:  # noqa: ARG004
        raise RuntimeError('residual_layer_norm has no second derivative in Triton; use backend="torch" for it')


def residual_layer_norm_fused(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute the op with the kernels of this file; arguments already checked."""
    tensors = (x, residual, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _ResidualLayerNorm.apply(*tensors, float(eps))
    return torch.ops.simsid.residual_layer_norm(*tensors, float(eps))[0]


def inspect_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield a name and a host call on meta tensors for the variants that presets and limits launch."""
    for features in (512, 8192, 35):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.empty(256, features, dtype=dtype, device="meta")
            weight, statistics = torch.empty(features, device="meta"), torch.empty(256, 2, device="meta")
            name = f"D={features} {str(dtype)[6:]}"
            yield f"forward {name}", functools.partial(_forward, x, x, weight, weight, 1e-5)
            yield f"backward {name}", functools.partial(_backward, x, x, weight, x, statistics, dtype)

"""Residual + LayerNorm + ReLU in Triton: one launch forward, one backward and one sum over the backward's parts.

    n = (x - mean) * rstd          out = relu(n * weight + bias + residual)
    g = grad_out where out > 0     grad_residual = g     grad_bias = sum_rows g     grad_weight = sum_rows g n
    grad_x = rstd (g w - mean(g w) - n mean(g w n))

Bytes: 3 R D forward, 5 R D backward, times the element size, and 2 D float32 for each backward program. Both kernels
are bound by bandwidth, and at the in-painting block's 256 rows by the launch. The design stops where a row no longer
fits the registers of one program (`MAX_FEATURES`).
"""

import triton
import triton.language as tl

_SHRINK = tl.constexpr(2.0**-70)  # exact; squares of the largest float32 numbers then stay below 2^116


@triton.jit
def _load(p, m):
    """Load zeros where masked, as float32 at once: the interpreter's bf16 arithmetic is that of raw bits."""
    return tl.load(p, mask=m, other=0.0).to(tl.float32)


@triton.jit
def residual_layer_norm_forward_kernel(
    # Pointers
    x_ptr,  # (R, D)
    residual_ptr,  # (R, D)
    weight_ptr,  # (D)
    bias_ptr,  # (D)
    out_ptr,  # (R, D), contiguous
    statistics_ptr,  # (R, 2), contiguous, float32: mean and 1 / standard deviation
    # Sizes
    eps,
    # Strides
    stride_x_r,
    stride_residual_r,
    # Constants
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Normalize one row, add the residual and apply ReLU.

    Grid: (R). A program owns one row in registers, so that x is read once.
    Saves: mean and reciprocal standard deviation of the row, from which the backward makes n again.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_x = _load(x_ptr + i_row * stride_x_r + o_d, m_d)
    mean = tl.sum(b_x, axis=0) / D
    b_deviation = tl.where(m_d, b_x - mean, 0.0)
    variance = tl.sum(b_deviation * b_deviation, axis=0) / D
    rstd = 1.0 / tl.sqrt(variance + eps)
    b_n = b_deviation * rstd
    if variance > 1e37:  # a sum or a square overflowed, or is about to: do it again on a smaller scale, without eps
        b_x *= _SHRINK
        mean = tl.sum(b_x, axis=0) / D
        b_deviation = tl.where(m_d, b_x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(b_deviation * b_deviation, axis=0) / D)
        b_n = b_deviation * rstd
        mean /= _SHRINK
        rstd *= _SHRINK
    b_y = b_n * _load(weight_ptr + o_d, m_d) + _load(bias_ptr + o_d, m_d)
    b_y += _load(residual_ptr + i_row * stride_residual_r + o_d, m_d)
    b_y = tl.where(b_y <= 0.0, 0.0, b_y)  # unlike a maximum, this lets a NaN through
    tl.store(out_ptr + i_row * D + o_d, b_y.to(out_ptr.dtype.element_ty), mask=m_d)
    tl.store(statistics_ptr + 2 * i_row, mean)
    tl.store(statistics_ptr + 2 * i_row + 1, rstd)


@triton.jit(do_not_specialize=("rows", "rows_per_program"))
def residual_layer_norm_backward_kernel(
    # Pointers
    grad_out_ptr,  # (R, D)
    x_ptr,  # (R, D)
    weight_ptr,  # (D)
    out_ptr,  # (R, D), contiguous
    statistics_ptr,  # (R, 2), contiguous, float32
    grad_x_ptr,  # (R, D), contiguous
    grad_residual_ptr,  # (R, D), contiguous
    grad_parts_ptr,  # (programs, 2, D), contiguous, float32: each program's part of grad_weight and grad_bias
    # Sizes, one machine code for all
    rows,  # R
    rows_per_program,
    # Strides
    stride_grad_out_r,
    stride_x_r,
    # Constants
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Make the gradients to x and residual of some rows, and their part of those to weight and bias.

    Grid: (parts). A program owns `rows_per_program` rows and takes them in order, one in registers at a time.
    Saves: its sums of g n and of g; `sum_parts_kernel` adds the parts, so that their order is fixed without atomics.
    """
    i_part = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_weight = _load(weight_ptr + o_d, m_d)
    b_grad_weight = tl.zeros((BLOCK_D,), tl.float32)
    b_grad_bias = tl.zeros((BLOCK_D,), tl.float32)
    first = i_part * rows_per_program
    for i_row in range(first, tl.minimum(first + rows_per_program, rows)):
        mean = tl.load(statistics_ptr + 2 * i_row)
        rstd = tl.load(statistics_ptr + 2 * i_row + 1)
        b_out = _load(out_ptr + i_row * D + o_d, m_d)
        b_g = tl.where(b_out <= 0.0, 0.0, _load(grad_out_ptr + i_row * stride_grad_out_r + o_d, m_d))
        b_n = tl.where(m_d, (_load(x_ptr + i_row * stride_x_r + o_d, m_d) - mean) * rstd, 0.0)
        b_grad_weight += b_g * b_n
        b_grad_bias += b_g
        tl.store(grad_residual_ptr + i_row * D + o_d, b_g.to(grad_residual_ptr.dtype.element_ty), mask=m_d)
        b_g *= b_weight
        b_grad_x = rstd * (b_g - tl.sum(b_g, axis=0) / D - b_n * (tl.sum(b_g * b_n, axis=0) / D))
        tl.store(grad_x_ptr + i_row * D + o_d, b_grad_x.to(grad_x_ptr.dtype.element_ty), mask=m_d)
    tl.store(grad_parts_ptr + 2 * i_part * D + o_d, b_grad_weight, mask=m_d)
    tl.store(grad_parts_ptr + (2 * i_part + 1) * D + o_d, b_grad_bias, mask=m_d)

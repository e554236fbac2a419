"""Gradients of the space-aware memory in Triton; the equations stand in `kernels.py`."""

import triton
import triton.language as tl

from simsid.kernels.memory.kernels import ANY_SIZE, sum_splits, valid_items
from simsid.kernels.memory.products import dot


@triton.jit(do_not_specialize=ANY_SIZE)
def memory_softmax_gradient_kernel(
    # Pointers
    partial_ptr,  # (SPLITS, B, L, N), contiguous, float32: dw
    p_ptr,  # (B, L, N), contiguous, float32: probabilities, negative where kept
    mask_ptr,  # (L, N), contiguous, or None: the items that may be selected
    similarity_ptr,  # (B, L, N), contiguous, float32, or None: the cosine
    query_scale_ptr,  # (B, L), contiguous, float32, or None like similarity_ptr: one over the norms of the queries
    item_scale_ptr,  # (L, N), contiguous, float32, or None like similarity_ptr: one over the norms of the items
    coefficient_ptr,  # (2, B, L, N), contiguous, float32: ds and w; for the cosine (3, B, L, N)
    projection_ptr,  # (B, L), contiguous, float32, or None like similarity_ptr
    # Sizes
    rows,  # B L
    L,
    N,
    temperature,
    # Constants
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
):
    """Make ds = p (dw - <p, dw>) / temperature and the dense w of one row.

    The cosine s of z and M has the derivatives M / (|z| |M|) - s z / |z|^2 and z / (|z| |M|) - s M / |M|^2. There ds is
    divided by both norms; ds s / |M|^2, whose sum over the queries multiplies M, is a third coefficient; and the sum of
    ds s / |z|^2 over the items, which multiplies z, is the row's projection.

    Grid: (B L). A program owns one row, in tiles of BLOCK_N items. Saves: all of these, for the products.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_tile = tl.arange(0, BLOCK_N)
    mean = 0.0
    total = 0.0
    for i_tile in range(TILES):
        o_n = i_tile * BLOCK_N + o_tile
        b_p = tl.load(p_ptr + i_row * N + o_n, mask=o_n < N, other=0.0)
        b_dw = sum_splits(partial_ptr, i_row, rows, o_n, o_n < N, N, SPLITS)
        mean += tl.sum(tl.abs(b_p) * b_dw, 0)
        total += tl.sum(tl.where(b_p < 0.0, -b_p, 0.0), 0)
    total = tl.where(total == 0.0, 1.0, total)
    projection = 0.0
    for i_tile in range(TILES):
        o_n = i_tile * BLOCK_N + o_tile
        b_p = tl.load(p_ptr + i_row * N + o_n, mask=o_n < N, other=0.0)
        b_dw = sum_splits(partial_ptr, i_row, rows, o_n, o_n < N, N, SPLITS)
        b_ds = tl.div_rn(tl.abs(b_p) * (b_dw - mean), temperature)
        if mask_ptr is not None:  # a gradient that is not finite must not reach masked items
            b_ds = tl.where(valid_items(mask_ptr, i_row % L, o_n, N), b_ds, 0.0)
        if similarity_ptr is not None:
            b_query = tl.load(query_scale_ptr + i_row)
            b_item = tl.load(item_scale_ptr + i_row % L * N + o_n, mask=o_n < N, other=0.0)
            b_turn = b_ds * tl.load(similarity_ptr + i_row * N + o_n, mask=o_n < N, other=0.0)
            projection += tl.sum(b_turn, 0) * b_query * b_query
            tl.store(
                coefficient_ptr + (2 * rows.to(tl.int64) + i_row) * N + o_n, b_turn * b_item * b_item, mask=o_n < N
            )
            b_ds *= b_query * b_item
        tl.store(coefficient_ptr + i_row * N + o_n, b_ds, mask=o_n < N)
        b_w = tl.where(b_p < 0.0, -b_p, 0.0 * b_p) / total
        tl.store(coefficient_ptr + (rows + i_row) * N + o_n, b_w, mask=o_n < N)
    if projection_ptr is not None:
        tl.store(projection_ptr + i_row, projection)


# Specialized on N % 16 == 0 it has fewer instructions, and spills.
@triton.jit(do_not_specialize=(*ANY_SIZE, "N"))
def memory_joint_gradient_kernel(
    # Pointers
    grad_out_ptr,  # (B, L, D)
    query_ptr,  # (B, L, D)
    memory_ptr,  # (L, N, D)
    mask_ptr,  # (L, N), contiguous, or None: the items that may be selected
    coefficient_ptr,  # (2, B, L, N), contiguous, float32: ds and w; for the cosine (3, B, L, N)
    projection_ptr,  # (B, L), contiguous, float32, or None: what the cosine takes from dz along z
    grad_query_ptr,  # (B, L, D), contiguous
    grad_memory_ptr,  # (L, N, D), contiguous
    # Sizes
    B,
    L,
    N,
    D,
    # Strides
    stride_grad_out_b,
    stride_grad_out_l,
    stride_q_b,
    stride_q_l,
    stride_m_l,
    stride_m_n,
    # Constants
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Make dz = ds M and dM = w' g + ds' z, reading M once; for the cosine also what lies along z and M.

    Grid: (blocks of D, L). A program owns one location with all its queries and items, and BLOCK_D features.
    """
    i_l = tl.program_id(1).to(tl.int64)
    o_b, o_n = tl.arange(0, BLOCK_B).to(tl.int64), tl.arange(0, BLOCK_N).to(tl.int64)
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_b, m_d = (o_b < B)[:, None], (o_d < D)[None, :]
    b_g = tl.load(
        grad_out_ptr + o_b[:, None] * stride_grad_out_b + i_l * stride_grad_out_l + o_d[None, :],
        mask=m_b & m_d,
        other=0.0,
    )
    b_z = tl.load(query_ptr + o_b[:, None] * stride_q_b + i_l * stride_q_l + o_d[None, :], mask=m_b & m_d, other=0.0)
    p_c = coefficient_ptr + (o_b[:, None] * L + i_l) * N
    p_m = memory_ptr + i_l * stride_m_l + o_d[None, :]
    p_dm = grad_memory_ptr + i_l * N * D + o_d[None, :]
    b_dz = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        o_row = start + o_n
        m_n = valid_items(mask_ptr, i_l, o_row, N)
        b_ds = tl.load(p_c + o_row[None, :], mask=m_b & m_n[None, :], other=0.0)
        b_w = tl.load(p_c + B.to(tl.int64) * L * N + o_row[None, :], mask=m_b & m_n[None, :], other=0.0)
        b_m = tl.load(p_m + o_row[:, None] * stride_m_n, mask=m_n[:, None] & m_d, other=0.0)
        b_dz = dot(b_ds, b_m, b_dz, PRECISION)
        b_dm = dot(tl.trans(b_w), b_g, tl.zeros([BLOCK_N, BLOCK_D], tl.float32), PRECISION)
        b_dm = dot(tl.trans(b_ds), b_z, b_dm, PRECISION)
        if projection_ptr is not None:
            b_turn = tl.load(p_c + 2 * B.to(tl.int64) * L * N + o_row[None, :], mask=m_b & m_n[None, :], other=0.0)
            b_dm -= tl.sum(b_turn, 0)[:, None] * b_m.to(tl.float32)
        if mask_ptr is not None:
            b_dm = tl.where(m_n[:, None], b_dm, 0.0)
        tl.store(p_dm + o_row[:, None] * D, b_dm, mask=(o_row < N)[:, None] & m_d)
    if projection_ptr is not None:
        b_dz -= tl.load(projection_ptr + o_b * L + i_l, mask=o_b < B, other=0.0)[:, None] * b_z.to(tl.float32)
    tl.store(grad_query_ptr + (o_b[:, None] * L + i_l) * D + o_d[None, :], b_dz, mask=m_b & m_d)


@triton.jit(do_not_specialize=ANY_SIZE)
def memory_query_gradient_kernel(
    # Pointers
    query_ptr,  # (B, L, D), or None like projection_ptr
    memory_ptr,  # (L, N, D)
    mask_ptr,  # (L, N), contiguous, or None: the items that may be selected
    coefficient_ptr,  # (2, B, L, N), contiguous, float32: ds and w; for the cosine (3, B, L, N)
    projection_ptr,  # (B, L), contiguous, float32, or None: what the cosine takes from dz along z
    grad_query_ptr,  # (B, L, D), contiguous
    # Sizes
    B,
    L,
    N,
    D,
    # Strides
    stride_q_b,
    stride_q_l,
    stride_m_l,
    stride_m_n,
    # Constants
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Make dz = ds M. Grid: (tiles of B * blocks of D, L). A program owns BLOCK_B queries and BLOCK_D features."""
    tiles_b = tl.cdiv(B, BLOCK_B)
    i_b, i_d, i_l = tl.program_id(0) % tiles_b, tl.program_id(0) // tiles_b, tl.program_id(1).to(tl.int64)
    o_b = (i_b * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    o_n, o_d = tl.arange(0, BLOCK_N).to(tl.int64), i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_b, m_d = (o_b < B)[:, None], (o_d < D)[None, :]
    p_c = coefficient_ptr + (o_b[:, None] * L + i_l) * N
    p_m = memory_ptr + i_l * stride_m_l + o_d[None, :]
    b_dz = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        o_row = start + o_n
        m_n = valid_items(mask_ptr, i_l, o_row, N)
        b_ds = tl.load(p_c + o_row[None, :], mask=m_b & m_n[None, :], other=0.0)
        b_m = tl.load(p_m + o_row[:, None] * stride_m_n, mask=m_n[:, None] & m_d, other=0.0)
        b_dz = dot(b_ds, b_m, b_dz, PRECISION)
    if projection_ptr is not None:
        p_z = query_ptr + o_b[:, None] * stride_q_b + i_l * stride_q_l + o_d[None, :]
        b_projection = tl.load(projection_ptr + o_b * L + i_l, mask=o_b < B, other=0.0)
        b_dz -= b_projection[:, None] * tl.load(p_z, mask=m_b & m_d, other=0.0).to(tl.float32)
    tl.store(grad_query_ptr + (o_b[:, None] * L + i_l) * D + o_d[None, :], b_dz, mask=m_b & m_d)


@triton.jit(do_not_specialize=ANY_SIZE)
def memory_items_gradient_kernel(
    # Pointers
    grad_out_ptr,  # (B, L, D)
    query_ptr,  # (B, L, D)
    memory_ptr,  # (L, N, D), or None where the similarity is the dot product
    mask_ptr,  # (L, N), contiguous, or None: the items that may be selected
    coefficient_ptr,  # (2, B, L, N), contiguous, float32: ds and w; for the cosine (3, B, L, N)
    grad_memory_ptr,  # (L, N, D), contiguous
    # Sizes
    B,
    L,
    N,
    D,
    # Strides
    stride_grad_out_b,
    stride_grad_out_l,
    stride_q_b,
    stride_q_l,
    stride_m_l,
    stride_m_n,
    # Constants
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Make dM = w' g + ds' z, queries in order.

    Grid: (tiles of N * blocks of D, L). A program owns BLOCK_N items of one location and BLOCK_D features.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    i_n, i_d, i_l = tl.program_id(0) % tiles_n, tl.program_id(0) // tiles_n, tl.program_id(1).to(tl.int64)
    o_b, o_n = tl.arange(0, BLOCK_B).to(tl.int64), (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < N, (o_d < D)[None, :]
    b_dm = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_turn = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, B, BLOCK_B):
        o_row = start + o_b
        m_b = (o_row < B)[:, None]
        p_c = coefficient_ptr + (o_row[:, None] * L + i_l) * N + o_n[None, :]
        b_ds = tl.load(p_c, mask=m_b & m_n[None, :], other=0.0)
        b_w = tl.load(p_c + B.to(tl.int64) * L * N, mask=m_b & m_n[None, :], other=0.0)
        p_g = grad_out_ptr + o_row[:, None] * stride_grad_out_b + i_l * stride_grad_out_l + o_d[None, :]
        p_z = query_ptr + o_row[:, None] * stride_q_b + i_l * stride_q_l + o_d[None, :]
        b_dm = dot(tl.trans(b_w), tl.load(p_g, mask=m_b & m_d, other=0.0), b_dm, PRECISION)
        b_dm = dot(tl.trans(b_ds), tl.load(p_z, mask=m_b & m_d, other=0.0), b_dm, PRECISION)
        if memory_ptr is not None:
            b_turn += tl.sum(tl.load(p_c + 2 * B.to(tl.int64) * L * N, mask=m_b & m_n[None, :], other=0.0), 0)
    m_valid = valid_items(mask_ptr, i_l, o_n, N)
    if memory_ptr is not None:
        p_m = memory_ptr + i_l * stride_m_l + o_n[:, None] * stride_m_n + o_d[None, :]
        b_dm -= b_turn[:, None] * tl.load(p_m, mask=m_valid[:, None] & m_d, other=0.0).to(tl.float32)
    if mask_ptr is not None:
        b_dm = tl.where(m_valid[:, None], b_dm, 0.0)
    tl.store(grad_memory_ptr + (i_l * N + o_n[:, None]) * D + o_d[None, :], b_dm, mask=m_n[:, None] & m_d)

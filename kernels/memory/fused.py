"""Space-aware memory in Triton: two launches forward, three or four backward, no atomics.

    forward    s = z M (partial sums over blocks of D);  top-k of s, p = softmax(s), out = w M  (one program a row)
    backward   dw = g M (the score kernel again);  ds = p (dw - <p, dw>);  dz = ds M and dM = w' g + ds' z

Bytes: forward reads M once and the kept rows again, out of the L2 cache at best; backward reads M once for dw and once
for dz, writes dM once, and keeps p [B, L, N] from the forward (negative where the item was kept: w needs no more).

Summation order depends on the memory's shape alone, so that a film's output is the same in every batch. Where the
design stops being good: many kept items (a pass over the row's keys for each), and large batches, where the products
are arithmetic and a plain matrix product is hard to beat.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from simsid.kernels.launch import launch, on_device
from simsid.kernels.memory.plan import (
    GradientPlan,
    ceil_div,
    plan_items_gradient,
    plan_joint_gradient,
    plan_query_gradient,
    plan_rows,
    plan_scores,
)

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_ANY_SIZE = ("B", "L", "rows")  # a machine code for B = 1 or B % 16 == 0 would be compiled anew and be no faster
_LOWEST = tl.constexpr(-(2**63))  # below every key of an item


@triton.jit
def _multiply(b_a, b_b, b_acc, PRECISION: tl.constexpr):
    """Add a @ b to the accumulator."""
    if _INTERPRETED:
        # The interpreter multiplies bf16 as raw bits; products of float32 copies are what the tensor cores compute.
        return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_acc, input_precision="ieee")
    return tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)


@triton.jit
def _dot(b_a, b_b, b_acc, PRECISION: tl.constexpr):
    """Add a @ b to the accumulator, nearly as exactly as float32 does where a is float32 and b has 16 bits."""
    if b_a.dtype == b_b.dtype:
        return _multiply(b_a, b_b, b_acc, PRECISION)
    if b_b.dtype == tl.bfloat16:
        b_high = b_a.to(tl.bfloat16)
        b_low = (b_a - b_high.to(tl.float32)).to(tl.bfloat16)
        return _multiply(b_high, b_b, _multiply(b_low, b_b, b_acc, PRECISION), PRECISION)
    # A float16 pair would lose the low half of small numbers to underflow; TF32 holds every float16.
    return _multiply(b_a.to(tl.float32), b_b.to(tl.float32), b_acc, PRECISION)


@triton.jit
def _sum_splits(partial_ptr, i_row, rows, o_n, m_n, N, SPLITS: tl.constexpr):
    """Add the partial sums of one row in their fixed order."""
    b_s = tl.zeros(o_n.shape, tl.float32)
    for i_split in tl.static_range(SPLITS):
        b_s += tl.load(partial_ptr + (i_split * rows.to(tl.int64) + i_row) * N + o_n, mask=m_n, other=0.0)
    return b_s


@triton.jit
def _logits(partial_ptr, noise_ptr, i_row, rows, o_n, m_n, N, temperature, SPLITS: tl.constexpr):
    """Similarity, noise and temperature of one row; -inf where masked."""
    b_s = _sum_splits(partial_ptr, i_row, rows, o_n, m_n, N, SPLITS)
    if noise_ptr is not None:
        b_s += tl.load(noise_ptr + i_row * N + o_n, mask=m_n, other=0.0).to(tl.float32)
    # Adding 0 makes -0 equal to +0, which their bits are not.
    return tl.where(m_n, tl.div_rn(b_s, temperature) + 0.0, float("-inf"))


@triton.jit
def _keys(b_s, o_n, m_n):
    """Pack score and index into integers that order by score, then lowest index first; NaN before all."""
    b_bits = b_s.to(tl.int32, bitcast=True)
    b_order = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    b_order = tl.where(b_s != b_s, 0x7FFFFFFF, b_order)
    b_key = (b_order.to(tl.int64) << 32) | (0x7FFFFFFF - o_n).to(tl.int64)
    return tl.where(m_n, b_key, _LOWEST)


@triton.jit
def _score_of(key):
    """Unpack the score of a key."""
    order = (key >> 32).to(tl.int32)
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def _merge_top(b_key, b_top, o_k, TOPK: tl.constexpr):
    """Return the TOPK largest of the keys and of the earlier top, largest first."""
    b_new = tl.full(b_top.shape, _LOWEST, tl.int64)
    for i_k in range(TOPK):
        best = tl.maximum(tl.max(b_key, 0), tl.max(b_top, 0))
        b_key = tl.where(b_key == best, _LOWEST, b_key)
        b_top = tl.where(b_top == best, _LOWEST, b_top)
        b_new = tl.where(o_k == i_k, best, b_new)
    return b_new


@triton.jit(do_not_specialize=_ANY_SIZE)
def memory_scores_kernel(
    query_ptr,  # (B, L, D): z in the forward, the output's gradient in the backward
    memory_ptr,  # (L, N, D)
    partial_ptr,  # (SPLITS, B, L, N), contiguous, float32
    B,
    L,
    N,
    D,
    chunk,  # features a split
    stride_q_b,
    stride_q_l,
    stride_m_l,
    stride_m_n,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply queries and items over one chunk of features; items are the rows, the side that suits tensor cores."""
    tiles_b, tiles_n = tl.cdiv(B, BLOCK_B), tl.cdiv(N, BLOCK_N)
    i_b, i_rest = tl.program_id(0) % tiles_b, tl.program_id(0) // tiles_b
    i_n, i_l = i_rest % tiles_n, (i_rest // tiles_n).to(tl.int64)
    i_split = tl.program_id(1).to(tl.int64)
    o_n, o_b = i_n * BLOCK_N + tl.arange(0, BLOCK_N), i_b * BLOCK_B + tl.arange(0, BLOCK_B)
    m_n, m_b = o_n < N, o_b < B
    p_m = memory_ptr + i_l * stride_m_l + o_n.to(tl.int64)[:, None] * stride_m_n
    p_q = query_ptr + i_l * stride_q_l + o_b.to(tl.int64)[:, None] * stride_q_b
    b_s = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    for start in range(0, chunk, BLOCK_D):
        o_d = tl.program_id(1) * chunk + start + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_m = tl.load(p_m + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_q = tl.load(p_q + o_d[None, :], mask=m_b[:, None] & m_d[None, :], other=0.0)
        b_s = _dot(b_m, tl.trans(b_q), b_s, PRECISION)
    p_s = partial_ptr + ((i_split * B + o_b.to(tl.int64)[None, :]) * L + i_l) * N + o_n[:, None]
    tl.store(p_s, b_s, mask=m_n[:, None] & m_b[None, :])


@triton.jit(do_not_specialize=_ANY_SIZE)
def memory_select_kernel(
    partial_ptr,  # (SPLITS, B, L, N), contiguous, float32
    noise_ptr,  # (B, L, N), contiguous, or None
    memory_ptr,  # (L, N, D)
    out_ptr,  # (B, L, D), contiguous
    p_ptr,  # (B, L, N), contiguous, float32, or None: probabilities, negative where kept
    rows,  # B L
    L,
    N,
    D,
    temperature,
    stride_m_l,
    stride_m_n,
    SPLITS: tl.constexpr,
    TOPK: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Select the items of one row, weigh them by the softmax of their scores alone, and add them up."""
    i_row = tl.program_id(0).to(tl.int64)
    o_k, o_tile = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    b_top = tl.full([BLOCK_K], _LOWEST, tl.int64)
    b_s = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for i_tile in range(TILES):
        o_n = i_tile * BLOCK_N + o_tile
        b_s = _logits(partial_ptr, noise_ptr, i_row, rows, o_n, o_n < N, N, temperature, SPLITS)
        b_top = _merge_top(_keys(b_s, o_n, o_n < N), b_top, o_k, TOPK)
    b_score = _score_of(b_top)
    greatest = _score_of(tl.max(b_top, 0))
    key_of_last = tl.max(tl.where(o_k == TOPK - 1, b_top, _LOWEST), 0)
    # The softmax's denominator cancels out of the weights. A NaN or infinity on top makes every exponential NaN.
    b_e = tl.where(o_k < TOPK, tl.exp(b_score - greatest), 0.0)
    if EXCLUSIVE:
        b_e *= tl.where(b_score > _score_of(key_of_last), 1.0, 0.0)
    total = tl.sum(b_e, 0)
    b_w = b_e / tl.where(total == 0.0, 1.0, total)

    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    # In range for every kept item whatever the scores; the bound guards the lanes beyond TOPK.
    b_index = tl.minimum(0x7FFFFFFF - (b_top & 0x7FFFFFFF), N - 1)
    p_m = memory_ptr + (i_row % L) * stride_m_l + b_index[:, None] * stride_m_n + o_d[None, :]
    m_m = (o_k < TOPK)[:, None] & (b_w != 0.0)[:, None] & (o_d < D)[None, :]
    b_m = tl.load(p_m, mask=m_m, other=0.0).to(tl.float32)
    tl.store(out_ptr + i_row * D + o_d, tl.sum(b_w[:, None] * b_m, 0), mask=o_d < D)

    if p_ptr is not None:  # noqa: SIM102 - decided when compiling, the next one when running
        if tl.program_id(1) == 0:
            total = 0.0
            for i_tile in range(TILES):
                if TILES > 1:
                    o_n = i_tile * BLOCK_N + o_tile
                    b_s = _logits(partial_ptr, noise_ptr, i_row, rows, o_n, o_n < N, N, temperature, SPLITS)
                total += tl.sum(tl.exp(b_s - greatest), 0)
            for i_tile in range(TILES):
                o_n = i_tile * BLOCK_N + o_tile
                if TILES > 1:
                    b_s = _logits(partial_ptr, noise_ptr, i_row, rows, o_n, o_n < N, N, temperature, SPLITS)
                b_p = tl.exp(b_s - greatest) / total
                if EXCLUSIVE:
                    m_kept = b_s > _score_of(key_of_last)
                else:
                    m_kept = _keys(b_s, o_n, o_n < N) >= key_of_last
                tl.store(p_ptr + i_row * N + o_n, tl.where(m_kept, -b_p, b_p), mask=o_n < N)


@triton.jit(do_not_specialize=_ANY_SIZE)
def memory_softmax_gradient_kernel(
    partial_ptr,  # (SPLITS, B, L, N), contiguous, float32: dw
    p_ptr,  # (B, L, N), contiguous, float32: probabilities, negative where kept
    coefficient_ptr,  # (2, B, L, N), contiguous, float32: ds and w
    rows,  # B L
    N,
    temperature,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
):
    """Make ds = p (dw - <p, dw>) / temperature and the dense w of one row."""
    i_row = tl.program_id(0).to(tl.int64)
    o_tile = tl.arange(0, BLOCK_N)
    mean = 0.0
    total = 0.0
    for i_tile in range(TILES):
        o_n = i_tile * BLOCK_N + o_tile
        b_p = tl.load(p_ptr + i_row * N + o_n, mask=o_n < N, other=0.0)
        b_dw = _sum_splits(partial_ptr, i_row, rows, o_n, o_n < N, N, SPLITS)
        mean += tl.sum(tl.abs(b_p) * b_dw, 0)
        total += tl.sum(tl.where(b_p < 0.0, -b_p, 0.0), 0)
    total = tl.where(total == 0.0, 1.0, total)
    for i_tile in range(TILES):
        o_n = i_tile * BLOCK_N + o_tile
        b_p = tl.load(p_ptr + i_row * N + o_n, mask=o_n < N, other=0.0)
        b_dw = _sum_splits(partial_ptr, i_row, rows, o_n, o_n < N, N, SPLITS)
        b_ds = tl.div_rn(tl.abs(b_p) * (b_dw - mean), temperature)
        tl.store(coefficient_ptr + i_row * N + o_n, b_ds, mask=o_n < N)
        b_w = tl.where(b_p < 0.0, -b_p, 0.0 * b_p) / total
        tl.store(coefficient_ptr + (rows + i_row) * N + o_n, b_w, mask=o_n < N)


@triton.jit(do_not_specialize=_ANY_SIZE)
def memory_joint_gradient_kernel(
    grad_ptr,  # (B, L, D)
    query_ptr,  # (B, L, D)
    memory_ptr,  # (L, N, D)
    coefficient_ptr,  # (2, B, L, N), contiguous, float32: ds and w
    dquery_ptr,  # (B, L, D), contiguous
    dmemory_ptr,  # (L, N, D), contiguous
    B,
    L,
    N,
    D,
    stride_g_b,
    stride_g_l,
    stride_q_b,
    stride_q_l,
    stride_m_l,
    stride_m_n,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Make dz = ds M and dM = w' g + ds' z for one location and BLOCK_D features, reading M once."""
    i_l = tl.program_id(1).to(tl.int64)
    o_b, o_n = tl.arange(0, BLOCK_B).to(tl.int64), tl.arange(0, BLOCK_N).to(tl.int64)
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_b, m_d = (o_b < B)[:, None], (o_d < D)[None, :]
    b_g = tl.load(grad_ptr + o_b[:, None] * stride_g_b + i_l * stride_g_l + o_d[None, :], mask=m_b & m_d, other=0.0)
    b_z = tl.load(query_ptr + o_b[:, None] * stride_q_b + i_l * stride_q_l + o_d[None, :], mask=m_b & m_d, other=0.0)
    p_c = coefficient_ptr + (o_b[:, None] * L + i_l) * N
    p_m = memory_ptr + i_l * stride_m_l + o_d[None, :]
    p_dm = dmemory_ptr + i_l * N * D + o_d[None, :]
    b_dz = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        o_row = start + o_n
        m_n = o_row < N
        b_ds = tl.load(p_c + o_row[None, :], mask=m_b & m_n[None, :], other=0.0)
        b_w = tl.load(p_c + B.to(tl.int64) * L * N + o_row[None, :], mask=m_b & m_n[None, :], other=0.0)
        b_m = tl.load(p_m + o_row[:, None] * stride_m_n, mask=m_n[:, None] & m_d, other=0.0)
        b_dz = _dot(b_ds, b_m, b_dz, PRECISION)
        b_dm = _dot(tl.trans(b_w), b_g, tl.zeros([BLOCK_N, BLOCK_D], tl.float32), PRECISION)
        b_dm = _dot(tl.trans(b_ds), b_z, b_dm, PRECISION)
        tl.store(p_dm + o_row[:, None] * D, b_dm, mask=m_n[:, None] & m_d)
    tl.store(dquery_ptr + (o_b[:, None] * L + i_l) * D + o_d[None, :], b_dz, mask=m_b & m_d)


@triton.jit(do_not_specialize=_ANY_SIZE)
def memory_query_gradient_kernel(
    memory_ptr,  # (L, N, D)
    coefficient_ptr,  # (2, B, L, N), contiguous, float32: ds and w
    dquery_ptr,  # (B, L, D), contiguous
    B,
    L,
    N,
    D,
    stride_m_l,
    stride_m_n,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Make dz = ds M for BLOCK_B queries of one location and BLOCK_D features."""
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
        m_n = o_row < N
        b_ds = tl.load(p_c + o_row[None, :], mask=m_b & m_n[None, :], other=0.0)
        b_m = tl.load(p_m + o_row[:, None] * stride_m_n, mask=m_n[:, None] & m_d, other=0.0)
        b_dz = _dot(b_ds, b_m, b_dz, PRECISION)
    tl.store(dquery_ptr + (o_b[:, None] * L + i_l) * D + o_d[None, :], b_dz, mask=m_b & m_d)


@triton.jit(do_not_specialize=_ANY_SIZE)
def memory_items_gradient_kernel(
    grad_ptr,  # (B, L, D)
    query_ptr,  # (B, L, D)
    coefficient_ptr,  # (2, B, L, N), contiguous, float32: ds and w
    dmemory_ptr,  # (L, N, D), contiguous
    B,
    L,
    N,
    D,
    stride_g_b,
    stride_g_l,
    stride_q_b,
    stride_q_l,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Make dM = w' g + ds' z for BLOCK_N items of one location and BLOCK_D features, queries in order."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    i_n, i_d, i_l = tl.program_id(0) % tiles_n, tl.program_id(0) // tiles_n, tl.program_id(1).to(tl.int64)
    o_b, o_n = tl.arange(0, BLOCK_B).to(tl.int64), (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < N, (o_d < D)[None, :]
    b_dm = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, B, BLOCK_B):
        o_row = start + o_b
        m_b = (o_row < B)[:, None]
        p_c = coefficient_ptr + (o_row[:, None] * L + i_l) * N + o_n[None, :]
        b_ds = tl.load(p_c, mask=m_b & m_n[None, :], other=0.0)
        b_w = tl.load(p_c + B.to(tl.int64) * L * N, mask=m_b & m_n[None, :], other=0.0)
        p_g = grad_ptr + o_row[:, None] * stride_g_b + i_l * stride_g_l + o_d[None, :]
        p_z = query_ptr + o_row[:, None] * stride_q_b + i_l * stride_q_l + o_d[None, :]
        b_dm = _dot(tl.trans(b_w), tl.load(p_g, mask=m_b & m_d, other=0.0), b_dm, PRECISION)
        b_dm = _dot(tl.trans(b_ds), tl.load(p_z, mask=m_b & m_d, other=0.0), b_dm, PRECISION)
    tl.store(dmemory_ptr + (i_l * N + o_n[:, None]) * D + o_d[None, :], b_dm, mask=m_n[:, None] & m_d)


class _Target(NamedTuple):
    """What the host code must know of the GPU and of PyTorch's settings."""

    precision: str  # of a product of two float32 numbers: "tf32x3", or "tf32" where PyTorch may do so too
    warp_groups: bool  # whole warp groups multiply, which the plans differ by


def _target(device: torch.device) -> _Target:
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    on_gpu = device.type == "cuda"
    return _Target(precision, not on_gpu or torch.cuda.get_device_capability(device)[0] in (9, 10))


def _rows(tensor: Tensor, shared: bool) -> Tensor:
    """Make features adjacent, and for a shared memory one location with B L queries."""
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    return tensor.reshape(-1, 1, tensor.shape[-1]) if shared else tensor


def _blocks(plan: GradientPlan, target: _Target) -> dict[str, int | str]:
    """Return the constants of a gradient kernel."""
    return {
        "BLOCK_B": plan.block_b,
        "BLOCK_N": plan.block_n,
        "BLOCK_D": plan.block_d,
        "PRECISION": target.precision,
    }


def _scores(query: Tensor, memory: Tensor, target: _Target) -> Tensor:
    """Return the partial sums `[splits, B, L, N]` of the products of queries and items."""
    B, L, D = query.shape
    N = memory.shape[1]
    plan = plan_scores(B, L, N, D, target.warp_groups)
    partial = query.new_empty(plan.splits, B, L, N, dtype=torch.float32)
    launch(
        memory_scores_kernel,
        (ceil_div(B, plan.block_b) * ceil_div(N, plan.block_n) * L, plan.splits),
        plan.num_warps,
        plan.num_stages,
        query_ptr=query,
        memory_ptr=memory,
        partial_ptr=partial,
        B=B,
        L=L,
        N=N,
        D=D,
        chunk=plan.chunk,
        stride_q_b=query.stride(0),
        stride_q_l=query.stride(1),
        stride_m_l=memory.stride(0),
        stride_m_n=memory.stride(1),
        BLOCK_N=plan.block_n,
        BLOCK_B=plan.block_b,
        BLOCK_D=plan.block_d,
        PRECISION=target.precision,
    )
    return partial


def memory_forward(
    query: Tensor,
    memory: Tensor,
    topk: int,
    exclusive: bool,
    noise: Tensor | None,
    temperature: float,
    save: bool,
    target: _Target | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output and, if `save`, the probabilities `[B, L, N]`, negative where the item was kept."""
    shape = query.shape
    out = torch.empty(shape, dtype=query.dtype, device=query.device)
    p = query.new_empty((*shape[:2], memory.shape[1]) if save else 0, dtype=torch.float32)
    if not shape[0]:
        return out, p
    shared = memory.shape[0] == 1
    query, memory = _rows(query, shared), _rows(memory, False)
    B, L, D = query.shape
    N = memory.shape[1]
    kept = min(topk, N)
    plan = plan_rows(N, D, kept)
    with on_device(query):
        partial = _scores(query, memory, target or _target(query.device))
        launch(
            memory_select_kernel,
            (B * L, ceil_div(D, plan.block_d)),
            plan.num_warps,
            1,
            partial_ptr=partial,
            noise_ptr=None if noise is None else noise.contiguous(),
            memory_ptr=memory,
            out_ptr=out,
            p_ptr=p if save else None,
            rows=B * L,
            L=L,
            N=N,
            D=D,
            temperature=temperature,
            stride_m_l=memory.stride(0),
            stride_m_n=memory.stride(1),
            SPLITS=partial.shape[0],
            TOPK=kept,
            EXCLUSIVE=exclusive,
            BLOCK_N=plan.block_n,
            TILES=plan.tiles,
            BLOCK_K=plan.block_k,
            BLOCK_D=plan.block_d,
        )
    return out, p


def memory_backward(
    grad: Tensor,
    query: Tensor,
    memory: Tensor,
    p: Tensor,
    temperature: float,
    need_query: bool,
    need_memory: bool,
    target: _Target | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of query and memory; one that is not needed has no elements."""
    dquery = torch.empty(query.shape if need_query else (0,), dtype=query.dtype, device=query.device)
    dmemory = torch.empty(memory.shape if need_memory else (0,), dtype=memory.dtype, device=query.device)
    if not query.shape[0]:
        return dquery, dmemory.zero_()
    shared = memory.shape[0] == 1
    grad, query, memory = _rows(grad, shared), _rows(query, shared), _rows(memory, False)
    B, L, D = query.shape
    N = memory.shape[1]
    rows = plan_rows(N, D, 1)
    target = target or _target(query.device)
    joint = plan_joint_gradient(B) if need_query and need_memory else None
    with on_device(query):
        partial = _scores(grad, memory, target)
        coefficient = p.new_empty(2, B, L, N)
        launch(
            memory_softmax_gradient_kernel,
            (B * L,),
            rows.num_warps,
            1,
            partial_ptr=partial,
            p_ptr=p,
            coefficient_ptr=coefficient,
            rows=B * L,
            N=N,
            temperature=temperature,
            SPLITS=partial.shape[0],
            BLOCK_N=rows.block_n,
            TILES=rows.tiles,
        )
        sizes = {"B": B, "L": L, "N": N, "D": D}
        of_rows = {
            "stride_g_b": grad.stride(0),
            "stride_g_l": grad.stride(1),
            "stride_q_b": query.stride(0),
            "stride_q_l": query.stride(1),
        }
        of_items = {"stride_m_l": memory.stride(0), "stride_m_n": memory.stride(1)}
        if joint is not None:
            launch(
                memory_joint_gradient_kernel,
                (ceil_div(D, joint.block_d), L),
                joint.num_warps,
                joint.num_stages,
                grad_ptr=grad,
                query_ptr=query,
                memory_ptr=memory,
                coefficient_ptr=coefficient,
                dquery_ptr=dquery,
                dmemory_ptr=dmemory,
                **sizes,
                **of_rows,
                **of_items,
                **_blocks(joint, target),
            )
            return dquery, dmemory
        if need_query:
            plan = plan_query_gradient(B, target.warp_groups)
            launch(
                memory_query_gradient_kernel,
                (ceil_div(B, plan.block_b) * ceil_div(D, plan.block_d), L),
                plan.num_warps,
                plan.num_stages,
                memory_ptr=memory,
                coefficient_ptr=coefficient,
                dquery_ptr=dquery,
                **sizes,
                **of_items,
                **_blocks(plan, target),
            )
        if need_memory:
            plan = plan_items_gradient(B, target.warp_groups)
            launch(
                memory_items_gradient_kernel,
                (ceil_div(N, plan.block_n) * ceil_div(D, plan.block_d), L),
                plan.num_warps,
                plan.num_stages,
                grad_ptr=grad,
                query_ptr=query,
                coefficient_ptr=coefficient,
                dmemory_ptr=dmemory,
                **sizes,
                **of_rows,
                **_blocks(plan, target),
            )
    return dquery, dmemory


_library = torch.library.Library("simsid", "FRAGMENT")
_library.define(
    "space_aware_memory(Tensor query, Tensor memory, int topk, bool exclusive, Tensor? noise, float temperature, "
    "bool save) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "space_aware_memory_backward(Tensor grad, Tensor query, Tensor memory, Tensor p, float temperature, "
    "bool need_query, bool need_memory) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _key in ("CUDA", "CPU"):
    _library.impl("space_aware_memory", memory_forward, _key)
    _library.impl("space_aware_memory_backward", memory_backward, _key)


@torch.library.register_fake("simsid::space_aware_memory", lib=_library)
def _(
    query: Tensor, memory: Tensor, topk: int, exclusive: bool, noise: Tensor | None, temperature: float, save: bool
) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:2], memory.shape[1]) if save else (0,)
    return query.new_empty(query.shape), query.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("simsid::space_aware_memory_backward", lib=_library)
def _(
    grad: Tensor, query: Tensor, memory: Tensor, p: Tensor, temperature: float, need_query: bool, need_memory: bool
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape if need_query else (0,)), memory.new_empty(memory.shape if need_memory else (0,))


class _Gradient(torch.autograd.Function):
    """The gradient where a graph of it is asked for: it runs, and says what is missing when differentiated again."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,  # noqa: ARG004
        *arguments: object,
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.simsid.space_aware_memory_backward(*arguments)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *_: Tensor) -> None:  # noqa: ARG004
        raise RuntimeError('the space-aware memory\'s kernels have no second derivative; use backend="torch"')


class _SpaceAwareMemory(torch.autograd.Function):
    """The op with its straight-through gradient.

    Without `setup_context`, which torch.func would need: with it every call binds its signature anew.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query: Tensor,
        memory: Tensor,
        topk: int,
        exclusive: bool,
        noise: Tensor | None,
        temperature: float,
    ) -> Tensor:
        out, p = torch.ops.simsid.space_aware_memory(query, memory, topk, exclusive, noise, temperature, True)
        ctx.save_for_backward(query, memory, p)
        ctx.temperature = temperature
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        function = _Gradient.apply if graph else torch.ops.simsid.space_aware_memory_backward
        grads = function(grad, *ctx.saved_tensors, ctx.temperature, *needs)
        return *(grad if need else None for grad, need in zip(grads, needs)), None, None, None, None


def space_aware_memory_fused(
    query: Tensor, memory: Tensor, topk: int, threshold: str, noise: Tensor | None, temperature: float
) -> Tensor:
    """Compute the op of `op.py`, whose checks are done, by the kernels."""
    arguments = (query, memory, topk, threshold == "exclusive", noise, float(temperature))
    if torch.is_grad_enabled() and (query.requires_grad or memory.requires_grad):
        return _SpaceAwareMemory.apply(*arguments)
    return torch.ops.simsid.space_aware_memory(*arguments, False)[0]


def inspect_cases() -> Iterator[tuple[str, Callable[[], None], tuple[int, ...]]]:
    """Yield names and calls, on meta tensors, that launch the variants the plans can choose, and on what GPUs."""
    for warp_groups, architectures in ((True, (90, 100)), (False, (80,))):
        for name, call in _cases(warp_groups):
            yield name, call, architectures


def _cases(warp_groups: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield names and calls for one kind of GPU."""

    def case(
        B: int,
        L: int,
        N: int,
        D: int,
        query: torch.dtype = torch.float32,
        memory: torch.dtype = torch.float32,
        topk: int = 5,
        exclusive: bool = False,
        noise: bool = False,
        needs: tuple[str, ...] = ("zM",),
        precision: str = "tf32x3",
    ) -> Callable[[], None]:
        target = _Target(precision, warp_groups)

        def call() -> None:
            z = torch.empty(B, L, D, dtype=query, device="meta")
            M = torch.empty(L, N, D, dtype=memory, device="meta")
            more = z.new_empty(B, L, N) if noise else None
            _, p = memory_forward(z, M, topk, exclusive, more, 1.0, bool(needs), target)
            for need in needs:
                memory_backward(z, z, M, p, 1.0, "z" in need, "M" in need, target)

        return call

    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    pairs = {
        "fp32": (float32, float32),
        "bf16": (bfloat16, float32),
        "fp16": (float16, float32),
        "bf16 memory too": (bfloat16, bfloat16),
        "fp16 memory too": (float16, float16),
    }
    for name, pair in pairs.items():
        yield f"A {name}", case(16, 16, 100, 512, *pair, needs=("zM", "z", "M"))
        yield f"A {name} batch 32", case(32, 16, 100, 512, *pair, needs=("zM", "z", "M"))
        yield f"A {name} batch 64", case(64, 16, 100, 512, *pair)
    for name in ("fp32", "bf16"):
        yield f"B {name}", case(16, 16, 100, 8192, *pairs[name])
        yield f"C {name}", case(256, 16, 500, 2048, *pairs[name])
        yield f"S {name}", case(16, 4, 200, 2048, *pairs[name])
    yield "A fp32 tf32", case(16, 16, 100, 512, precision="tf32")
    yield "A fp32 exclusive", case(16, 16, 100, 512, exclusive=True)
    yield "A fp32 noise", case(16, 16, 100, 512, noise=True)
    yield "A fp32 inference", case(16, 16, 100, 512, needs=())
    yield "A fp32 k=1", case(16, 16, 100, 512, topk=1)
    yield "A fp32 k=64", case(16, 16, 100, 512, topk=64)
    yield "N=4096 fp32", case(16, 16, 4096, 512, topk=16)
    yield "N=8192 fp32", case(16, 16, 8192, 512)
    yield "odd fp32", case(3, 5, 37, 203, needs=("zM", "z", "M"))
    yield "odd bf16", case(3, 5, 37, 203, bfloat16)
    yield "tiny fp32", case(2, 3, 4, 3, topk=1)

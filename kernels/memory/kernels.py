"""Space-aware memory in Triton: two launches forward, three or four backward, no atomics.

    forward    s = z M (partial sums over splits of D);  top-k of s, p = softmax(s), out = w M  (one program a row)
    backward   dw = g M (the score kernel again);  ds = p (dw - <p, dw>);  dz = ds M and dM = w' g + ds' z

Bytes: the forward reads M once, and the kept items again out of L2 at best; the backward reads M once for dw and once
for dz, writes dM once, and reads p [B, L, N], which the forward saves with a minus sign where the item was kept. The
order of sums depends on the memory's shape alone: an image's output is the same in every batch. The design stops being
good with many kept items (a pass over the row's keys each) and at large batches, where plain matrix products win.
"""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_ANY_SIZE = ("B", "L", "rows")  # specializing on B = 1 or B % 16 == 0 would compile again and be no faster
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
    """Return (similarity + noise) / temperature of one row; -inf where masked."""
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
    # Pointers
    query_ptr,  # (B, L, D): z in the forward, the output's gradient in the backward
    memory_ptr,  # (L, N, D)
    partial_ptr,  # (SPLITS, B, L, N), contiguous, float32
    # Sizes
    B,
    L,
    N,
    D,
    chunk,  # features of a split
    # Strides
    stride_q_b,
    stride_q_l,
    stride_m_l,
    stride_m_n,
    # Constants
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply queries and items over one chunk of features.

    Grid: (tiles of B * tiles of N * L, SPLITS), tiles of B fastest: they share the items in L2. A program owns BLOCK_N
    items, the side of the product that suits tensor cores, BLOCK_B queries and one chunk. Saves: the partial sums.
    """
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
    # Pointers
    partial_ptr,  # (SPLITS, B, L, N), contiguous, float32
    noise_ptr,  # (B, L, N), contiguous, or None
    memory_ptr,  # (L, N, D)
    out_ptr,  # (B, L, D), contiguous
    p_ptr,  # (B, L, N), contiguous, float32, or None: probabilities, negative where kept
    index_ptr,  # (B, L, TOPK), contiguous, int64, or None: the kept items, largest score first
    weight_ptr,  # (B, L, TOPK), contiguous, float32, or None like index_ptr: their weights
    # Sizes
    rows,  # B L
    L,
    N,
    D,
    temperature,
    # Strides
    stride_m_l,
    stride_m_n,
    # Constants
    SPLITS: tl.constexpr,
    TOPK: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Select the items of one row, weigh them by the softmax of their scores alone, and add them up.

    Grid: (B L, blocks of D). A program owns one row and BLOCK_D features; the programs of a row repeat the selection.
    Saves, by the first program of a row: the probabilities for the backward, indices and weights where asked for.
    """
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

    if index_ptr is not None:  # noqa: SIM102 - decided when compiling, the next one when running
        if tl.program_id(1) == 0:
            tl.store(index_ptr + i_row * TOPK + o_k, b_index, mask=o_k < TOPK)
            tl.store(weight_ptr + i_row * TOPK + o_k, b_w, mask=o_k < TOPK)
    if p_ptr is not None:  # noqa: SIM102 - as above
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
    # Pointers
    partial_ptr,  # (SPLITS, B, L, N), contiguous, float32: dw
    p_ptr,  # (B, L, N), contiguous, float32: probabilities, negative where kept
    coefficient_ptr,  # (2, B, L, N), contiguous, float32: ds and w
    # Sizes
    rows,  # B L
    N,
    temperature,
    # Constants
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
):
    """Make ds = p (dw - <p, dw>) / temperature and the dense w of one row.

    Grid: (B L). A program owns one row, in tiles of BLOCK_N items. Saves: both, for the products.
    """
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
    # Pointers
    grad_out_ptr,  # (B, L, D)
    query_ptr,  # (B, L, D)
    memory_ptr,  # (L, N, D)
    coefficient_ptr,  # (2, B, L, N), contiguous, float32: ds and w
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
    """Make dz = ds M and dM = w' g + ds' z, reading M once.

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
        m_n = o_row < N
        b_ds = tl.load(p_c + o_row[None, :], mask=m_b & m_n[None, :], other=0.0)
        b_w = tl.load(p_c + B.to(tl.int64) * L * N + o_row[None, :], mask=m_b & m_n[None, :], other=0.0)
        b_m = tl.load(p_m + o_row[:, None] * stride_m_n, mask=m_n[:, None] & m_d, other=0.0)
        b_dz = _dot(b_ds, b_m, b_dz, PRECISION)
        b_dm = _dot(tl.trans(b_w), b_g, tl.zeros([BLOCK_N, BLOCK_D], tl.float32), PRECISION)
        b_dm = _dot(tl.trans(b_ds), b_z, b_dm, PRECISION)
        tl.store(p_dm + o_row[:, None] * D, b_dm, mask=m_n[:, None] & m_d)
    tl.store(grad_query_ptr + (o_b[:, None] * L + i_l) * D + o_d[None, :], b_dz, mask=m_b & m_d)


@triton.jit(do_not_specialize=_ANY_SIZE)
def memory_query_gradient_kernel(
    # Pointers
    memory_ptr,  # (L, N, D)
    coefficient_ptr,  # (2, B, L, N), contiguous, float32: ds and w
    grad_query_ptr,  # (B, L, D), contiguous
    # Sizes
    B,
    L,
    N,
    D,
    # Strides
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
        m_n = o_row < N
        b_ds = tl.load(p_c + o_row[None, :], mask=m_b & m_n[None, :], other=0.0)
        b_m = tl.load(p_m + o_row[:, None] * stride_m_n, mask=m_n[:, None] & m_d, other=0.0)
        b_dz = _dot(b_ds, b_m, b_dz, PRECISION)
    tl.store(grad_query_ptr + (o_b[:, None] * L + i_l) * D + o_d[None, :], b_dz, mask=m_b & m_d)


@triton.jit(do_not_specialize=_ANY_SIZE)
def memory_items_gradient_kernel(
    # Pointers
    grad_out_ptr,  # (B, L, D)
    query_ptr,  # (B, L, D)
    coefficient_ptr,  # (2, B, L, N), contiguous, float32: ds and w
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
    for start in range(0, B, BLOCK_B):
        o_row = start + o_b
        m_b = (o_row < B)[:, None]
        p_c = coefficient_ptr + (o_row[:, None] * L + i_l) * N + o_n[None, :]
        b_ds = tl.load(p_c, mask=m_b & m_n[None, :], other=0.0)
        b_w = tl.load(p_c + B.to(tl.int64) * L * N, mask=m_b & m_n[None, :], other=0.0)
        p_g = grad_out_ptr + o_row[:, None] * stride_grad_out_b + i_l * stride_grad_out_l + o_d[None, :]
        p_z = query_ptr + o_row[:, None] * stride_q_b + i_l * stride_q_l + o_d[None, :]
        b_dm = _dot(tl.trans(b_w), tl.load(p_g, mask=m_b & m_d, other=0.0), b_dm, PRECISION)
        b_dm = _dot(tl.trans(b_ds), tl.load(p_z, mask=m_b & m_d, other=0.0), b_dm, PRECISION)
    tl.store(grad_memory_ptr + (i_l * N + o_n[:, None]) * D + o_d[None, :], b_dm, mask=m_n[:, None] & m_d)

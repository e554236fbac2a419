"""Space-aware memory in Triton: two launches forward, three or four backward, no atomics.

    forward    s = z M (partial sums over splits of D);  top-k of s, p = softmax(s), out = w M  (one program a row)
    backward   dw = g M (the score kernel again);  ds = p (dw - <p, dw>);  dz = ds M and dM = w' g + ds' z

Bytes: the forward reads M once, and the kept items again out of L2 at best; the backward reads M once for dw and once
for dz, writes dM once, and reads p [B, L, N], which the forward saves with a minus sign where the item was kept. Masked
items are not read. The cosine costs one launch more and no pass over M. The order of sums depends on the memory's shape
alone: an image's output is the same in every batch. The design stops being good with many kept items (a pass over the
row's keys each) and at large batches, where plain matrix products win.
"""

import triton
import triton.language as tl

from simsid.kernels.memory.products import dot

ANY_SIZE = ("B", "L", "rows")  # specializing on B = 1 or B % 16 == 0 would compile again and be no faster
_LOWEST, _HIGHEST = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)  # below and above every key of an item
_MASKED = tl.constexpr(-(2**31))  # stands for the score in the key of a masked item, below minus infinity
_FIRST_VALID = tl.constexpr((1 - 2**31) << 32)  # keys from here on are of items that are not masked
_ZERO = tl.constexpr(1e-24)  # a row of features with a square up to here counts as zero


@triton.jit
def sum_splits(partial_ptr, i_row, rows, o_n, m_n, N, SPLITS: tl.constexpr):
    """Add the partial sums of one row in their fixed order."""
    b_s = tl.zeros(o_n.shape, tl.float32)
    for i_split in tl.static_range(SPLITS):
        b_s += tl.load(partial_ptr + (i_split * rows.to(tl.int64) + i_row) * N + o_n, mask=m_n, other=0.0)
    return b_s


@triton.jit
def valid_items(mask_ptr, i_l, o_n, N):
    """Return which of the items exist and are not masked."""
    m_n = o_n < N
    if mask_ptr is not None:
        m_n = m_n & (tl.load(mask_ptr + i_l * N + o_n, mask=m_n, other=0) != 0)
    return m_n


@triton.jit
def _logits(partial_ptr, noise_ptr, i_row, rows, o_n, m_n, N, temperature, SPLITS: tl.constexpr):
    """Return (similarity + noise) / temperature of one row; -inf where masked."""
    b_s = sum_splits(partial_ptr, i_row, rows, o_n, m_n, N, SPLITS)
    if noise_ptr is not None:
        b_s += tl.load(noise_ptr + i_row * N + o_n, mask=m_n, other=0.0).to(tl.float32)
    # Adding 0 makes -0 equal to +0, which their bits are not.
    return tl.where(m_n, tl.div_rn(b_s, temperature) + 0.0, float("-inf"))


@triton.jit
def _keys(b_s, o_n, m_n):
    """Pack score and index into integers that order by score, then lowest index first; NaN before all, masked last."""
    b_bits = b_s.to(tl.int32, bitcast=True)
    b_order = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    b_order = tl.where(b_s != b_s, 0x7FFFFFFF, b_order)
    return (tl.where(m_n, b_order, _MASKED).to(tl.int64) << 32) | (0x7FFFFFFF - o_n).to(tl.int64)


@triton.jit
def _score_of(key):
    """Unpack the score of a key."""
    order = (key >> 32).to(tl.int32)
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def _merge_top(b_key, b_top, o_k, TOPK: tl.constexpr, FIRST: tl.constexpr):
    """Return the TOPK largest of the keys and, but for the FIRST time, of the earlier top, largest first."""
    b_new = tl.full(b_top.shape, _LOWEST, tl.int64)
    for i_k in range(TOPK):
        best = tl.max(b_key, 0)
        if not FIRST:
            best = tl.maximum(best, tl.max(b_top, 0))
            b_top = tl.where(b_top == best, _LOWEST, b_top)
        b_key = tl.where(b_key == best, _LOWEST, b_key)
        b_new = tl.where(o_k == i_k, best, b_new)
    return b_new


@triton.jit(do_not_specialize=ANY_SIZE)
def memory_scores_kernel(
    # Pointers
    query_ptr,  # (B, L, D): z in the forward, the output's gradient in the backward
    memory_ptr,  # (L, N, D)
    mask_ptr,  # (L, N), contiguous, or None: the items that may be selected
    partial_ptr,  # (SPLITS, B, L, N), contiguous, float32
    query_square_ptr,  # (SPLITS, B, L), contiguous, float32, or None: squares of the queries
    item_square_ptr,  # (SPLITS, L, N), contiguous, float32, or None like query_square_ptr: squares of the items
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
    items, the side of the product that suits tensor cores, BLOCK_B queries and one chunk. Saves: the partial sums, and
    for the cosine those of the squares of queries and items.
    """
    tiles_b, tiles_n = tl.cdiv(B, BLOCK_B), tl.cdiv(N, BLOCK_N)
    i_b, i_rest = tl.program_id(0) % tiles_b, tl.program_id(0) // tiles_b
    i_n, i_l = i_rest % tiles_n, (i_rest // tiles_n).to(tl.int64)
    i_split = tl.program_id(1).to(tl.int64)
    o_n, o_b = i_n * BLOCK_N + tl.arange(0, BLOCK_N), i_b * BLOCK_B + tl.arange(0, BLOCK_B)
    m_n, m_b = valid_items(mask_ptr, i_l, o_n, N), o_b < B
    p_m = memory_ptr + i_l * stride_m_l + o_n.to(tl.int64)[:, None] * stride_m_n
    p_q = query_ptr + i_l * stride_q_l + o_b.to(tl.int64)[:, None] * stride_q_b
    b_s = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    b_mm, b_qq = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, chunk, BLOCK_D):
        o_d = tl.program_id(1) * chunk + start + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_m = tl.load(p_m + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_q = tl.load(p_q + o_d[None, :], mask=m_b[:, None] & m_d[None, :], other=0.0)
        if query_square_ptr is not None:
            # Where registers read a 16-bit block too, Triton 3.9 overwrites it before the tensor cores have read it.
            b_s = dot(b_m, tl.trans(b_q), b_s, PRECISION, WIDE=True)
            b_mm += tl.sum(b_m.to(tl.float32) * b_m.to(tl.float32), 1)
            b_qq += tl.sum(b_q.to(tl.float32) * b_q.to(tl.float32), 1)
        else:
            b_s = dot(b_m, tl.trans(b_q), b_s, PRECISION)
    p_s = partial_ptr + ((i_split * B + o_b.to(tl.int64)[None, :]) * L + i_l) * N + o_n[:, None]
    tl.store(p_s, b_s, mask=(o_n < N)[:, None] & m_b[None, :])
    if query_square_ptr is not None:
        if i_b == 0:
            tl.store(item_square_ptr + (i_split * L + i_l) * N + o_n, b_mm, mask=o_n < N)
        if i_n == 0:
            tl.store(query_square_ptr + (i_split * B + o_b.to(tl.int64)) * L + i_l, b_qq, mask=m_b)


@triton.jit
def _inverse_norms(square_ptr, i_row, rows, o_n, m_n, N, SPLITS: tl.constexpr):
    """Return one over the norm of each row of features, from partial sums of squares; 0 for a row of zeros."""
    b_square = sum_splits(square_ptr, i_row, rows, o_n, m_n, N, SPLITS)
    return tl.where(b_square <= _ZERO, 0.0, tl.div_rn(1.0, tl.sqrt_rn(b_square)))


@triton.jit(do_not_specialize=ANY_SIZE)
def memory_cosine_kernel(
    # Pointers
    partial_ptr,  # (SPLITS, B, L, N), contiguous, float32
    query_square_ptr,  # (SPLITS, B, L), contiguous, float32
    item_square_ptr,  # (SPLITS, L, N), contiguous, float32
    similarity_ptr,  # (B, L, N), contiguous, float32
    query_scale_ptr,  # (B, L), contiguous, float32
    item_scale_ptr,  # (L, N), contiguous, float32
    # Sizes
    rows,  # B L
    L,
    N,
    # Constants
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
):
    """Divide the products of one row by the norms of its query and items.

    Grid: (B L). A program owns one row, in tiles of BLOCK_N items. Saves: the similarities; one over each norm.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_query = tl.zeros([1], tl.int32)
    b_query = _inverse_norms(query_square_ptr, i_row, rows, o_query, o_query == 0, 1, SPLITS)
    tl.store(query_scale_ptr + i_row + o_query, b_query)
    for i_tile in range(TILES):
        o_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        b_item = _inverse_norms(item_square_ptr, i_row % L, L, o_n, o_n < N, N, SPLITS)
        b_s = sum_splits(partial_ptr, i_row, rows, o_n, o_n < N, N, SPLITS)
        tl.store(similarity_ptr + i_row * N + o_n, b_s * b_query * b_item, mask=o_n < N)
        if i_row < L:  # the rows of the first image, one for each location
            tl.store(item_scale_ptr + i_row * N + o_n, b_item, mask=o_n < N)


@triton.jit(do_not_specialize=ANY_SIZE)
def memory_select_kernel(
    # Pointers
    partial_ptr,  # (SPLITS, B, L, N), contiguous, float32
    noise_ptr,  # (B, L, N), contiguous, or None
    memory_ptr,  # (L, N, D)
    mask_ptr,  # (L, N), contiguous, or None: the items that may be selected
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
    BLOCKS: tl.constexpr,
):
    """Select the items of one row, weigh them by the softmax of their scores alone, and add them up.

    Grid: (B L, parts of D). A program owns one row and BLOCKS times BLOCK_D features; the programs of a row repeat the
    selection.
    Saves, by the first program of a row: the probabilities for the backward, indices and weights where asked for.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_k, o_tile = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    b_top = tl.full([BLOCK_K], _LOWEST, tl.int64)
    b_s = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for i_tile in range(TILES):
        o_n = i_tile * BLOCK_N + o_tile
        m_n = valid_items(mask_ptr, i_row % L, o_n, N)
        b_s = _logits(partial_ptr, noise_ptr, i_row, rows, o_n, m_n, N, temperature, SPLITS)
        b_top = _merge_top(_keys(b_s, o_n, m_n), b_top, o_k, TOPK, TILES == 1)
    b_score = _score_of(b_top)
    greatest = _score_of(tl.max(b_top, 0))
    m_k = b_top >= _FIRST_VALID  # neither masked nor a lane beyond TOPK
    key_of_last = tl.min(tl.where(m_k, b_top, _HIGHEST), 0)
    # The softmax's denominator cancels out of the weights. A NaN or infinity on top makes every exponential NaN.
    b_e = tl.where(m_k, tl.exp(b_score - greatest), 0.0)
    if EXCLUSIVE:
        b_e *= tl.where(b_score > _score_of(key_of_last), 1.0, 0.0)
    total = tl.sum(b_e, 0)
    b_w = b_e / tl.where(total == 0.0, 1.0, total)

    # In range for every kept item whatever the scores; the bound guards the lanes beyond TOPK.
    b_index = tl.minimum(0x7FFFFFFF - (b_top & 0x7FFFFFFF), N - 1)
    p_m = memory_ptr + (i_row % L) * stride_m_l + b_index[:, None] * stride_m_n
    for i_block in range(BLOCKS):
        o_d = (tl.program_id(1) * BLOCKS + i_block) * BLOCK_D + tl.arange(0, BLOCK_D)
        m_m = (o_k < TOPK)[:, None] & (b_w != 0.0)[:, None] & (o_d < D)[None, :]
        b_m = tl.load(p_m + o_d[None, :], mask=m_m, other=0.0).to(tl.float32)
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
                    m_n = valid_items(mask_ptr, i_row % L, o_n, N)
                    b_s = _logits(partial_ptr, noise_ptr, i_row, rows, o_n, m_n, N, temperature, SPLITS)
                total += tl.sum(tl.exp(b_s - greatest), 0)
            for i_tile in range(TILES):
                o_n = i_tile * BLOCK_N + o_tile
                m_n = valid_items(mask_ptr, i_row % L, o_n, N)
                if TILES > 1:
                    b_s = _logits(partial_ptr, noise_ptr, i_row, rows, o_n, m_n, N, temperature, SPLITS)
                b_p = tl.exp(b_s - greatest) / total
                if mask_ptr is not None:  # without a valid item `greatest` is NaN
                    b_p = tl.where(m_n, b_p, 0.0)
                if EXCLUSIVE:
                    m_kept = b_s > _score_of(key_of_last)
                else:
                    m_kept = _keys(b_s, o_n, m_n) >= key_of_last
                tl.store(p_ptr + i_row * N + o_n, tl.where(m_kept, -b_p, b_p), mask=o_n < N)

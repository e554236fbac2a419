"""Neighbor attention in Triton: one launch forward, one backward, and with pads one that sums their gradients.

    a[l, m] = softmax over the neighbors m of l of <q[l], k[m]> * scale        out[l] = sum_m a[l, m] v[m]
    dv[m]   = sum_l a[l, m] g[l]          ds[l, m] = a[l, m] (<g[l], v[m]> - sum_m a[l, m] <g[l], v[m]>)
    dq[l]   = scale sum_m ds[l, m] k[m]   dk[m]    = scale sum_l ds[l, m] q[l]

The neighbors outside the grid share one key and value: one more slot of weight missing * exp(<q, pad_key> * scale).
Bytes: 4 B L D forward, 7 B L D backward, times the element size; neighbors come out of L1. No tensor cores: of L keys
eight take part, so a dense L x L product would do L / 8 times the arithmetic, round float32 to TF32 and spread a NaN
to locations that cannot see it. Above 256 locations (`MAX_LOCATIONS`) a head would need several programs, and above 9
keys (`MAX_KEYS`) a location's weights and rows no longer fit the registers.

The window is WINDOW_ROWS x WINDOW_COLUMNS cells, STEP_ROWS and STEP_COLUMNS locations apart; without CENTER its middle
cell has no slot. The slots beyond its cells, up to a power of two, are empty.
"""

import triton
import triton.language as tl


@triton.jit
def _step(
    o_slot,
    o_l,
    SIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLUMNS: tl.constexpr,
    STEP_ROWS: tl.constexpr,
    STEP_COLUMNS: tl.constexpr,
    CENTER: tl.constexpr,
):
    """Return the neighbor in a slot of a location, and whether both exist.

    Slot n of location l is the location at offset n from l (SIGN 1), or the one from which l is at offset n (SIGN -1).
    """
    MIDDLE: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS // 2
    o_cell = o_slot
    if not CENTER:
        o_cell += (o_slot >= MIDDLE).to(tl.int32)
    o_row = o_l // COLUMNS + SIGN * STEP_ROWS * (o_cell // WINDOW_COLUMNS - WINDOW_ROWS // 2)
    o_column = o_l % COLUMNS + SIGN * STEP_COLUMNS * (o_cell % WINDOW_COLUMNS - WINDOW_COLUMNS // 2)
    m_to = (o_row >= 0) & (o_row < ROWS) & (o_column >= 0) & (o_column < COLUMNS) & (o_l < ROWS * COLUMNS)
    m_to = m_to & (o_cell < WINDOW_ROWS * WINDOW_COLUMNS)
    return tl.where(m_to, o_row * COLUMNS + o_column, 0), m_to


@triton.jit
def _neighbors(
    SIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLUMNS: tl.constexpr,
    STEP_ROWS: tl.constexpr,
    STEP_COLUMNS: tl.constexpr,
    CENTER: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Return neighbors and mask as `[SLOTS, BLOCK_L]`, for weights, and as rows `[SLOTS * BLOCK_L, 1]`, for loads."""
    o_flat = tl.arange(0, SLOTS * BLOCK_L)[:, None]
    o_to, m_to = _step(
        tl.arange(0, SLOTS)[:, None],
        tl.arange(0, BLOCK_L)[None, :],
        SIGN,
        ROWS,
        COLUMNS,
        WINDOW_ROWS,
        WINDOW_COLUMNS,
        STEP_ROWS,
        STEP_COLUMNS,
        CENTER,
    )
    o_flat_to, m_flat_to = _step(
        o_flat // BLOCK_L,
        o_flat % BLOCK_L,
        SIGN,
        ROWS,
        COLUMNS,
        WINDOW_ROWS,
        WINDOW_COLUMNS,
        STEP_ROWS,
        STEP_COLUMNS,
        CENTER,
    )
    return o_to, m_to, o_flat_to, m_flat_to


@triton.jit
def _inside(o, SIDE: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr):
    """Return how many cells of the window around an index lie inside one side of the grid."""
    return 1 + tl.minimum(o // STEP, WINDOW // 2) + tl.minimum((SIDE - 1 - o) // STEP, WINDOW // 2)


@triton.jit
def _missing(
    o_l,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLUMNS: tl.constexpr,
    STEP_ROWS: tl.constexpr,
    STEP_COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Return how many neighbors of a location lie outside the grid."""
    b_rows = _inside(o_l // COLUMNS, ROWS, WINDOW_ROWS, STEP_ROWS)
    b_columns = _inside(o_l % COLUMNS, COLUMNS, WINDOW_COLUMNS, STEP_COLUMNS)
    # Rows of the tile beyond the grid have no neighbor, like a location alone: that path keeps them finite.
    b_missing = tl.where(o_l < ROWS * COLUMNS, WINDOW_ROWS * WINDOW_COLUMNS - b_rows * b_columns, KEYS)
    return b_missing.to(tl.float32)


@triton.jit
def _takes_part(key_mask_ptr, i_b, o_key, m_key, LOCATIONS: tl.constexpr):
    """Narrow a mask of keys to those that take part."""
    if key_mask_ptr is not None:
        m_key = m_key & (tl.load(key_mask_ptr + i_b * LOCATIONS + o_key, mask=m_key, other=0) != 0)
    return m_key


@triton.jit
def _softmax(b_s, m_to, b_s_pad, b_missing, KEYS: tl.constexpr, HAS_PAD: tl.constexpr, HAS_MASK: tl.constexpr):
    """Return the weights `[SLOTS, BLOCK_L]` of the neighbors and `[1, BLOCK_L]` of all those outside together."""
    b_s = tl.where(m_to, b_s, float("-inf"))
    b_max = tl.max(b_s, axis=0)[None, :]
    m_alone = b_missing == KEYS
    if HAS_MASK:
        m_alone = tl.max(m_to.to(tl.int32), axis=0)[None, :] == 0
    if HAS_PAD:
        b_max = tl.maximum(b_max, tl.where(b_missing > 0, b_s_pad, float("-inf")))
        m_alone = m_alone & (b_missing == 0)
    if HAS_MASK or not HAS_PAD:
        b_max = tl.where(m_alone, 0.0, b_max)  # no key at all: weights of zero, not 0 / 0
    b_w = tl.where(m_to, tl.exp(b_s - b_max), 0.0)
    b_sum = tl.sum(b_w, axis=0)[None, :]
    b_w_pad = tl.zeros_like(b_sum)
    if HAS_PAD:
        b_w_pad = tl.where(b_missing > 0, b_missing * tl.exp(b_s_pad - b_max), 0.0)
        b_sum += b_w_pad
    if HAS_MASK or not HAS_PAD:
        b_sum = tl.where(m_alone, 1.0, b_sum)
    return b_w / b_sum, b_w_pad / b_sum


@triton.jit
def _load(p, m, SLOTS: tl.constexpr):
    """Load rows `[SLOTS * BLOCK_L, BLOCK_W]` as `[SLOTS, BLOCK_L, BLOCK_W]`, zeros where masked.

    The load is two-dimensional: versions of Triton order the threads of a three-dimensional load differently, and
    those that spread them over the slots need shared memory at every step. Float32 at once, because the interpreter's
    bf16 arithmetic is that of raw bits.
    """
    b = tl.load(p, mask=m, other=0.0).to(tl.float32)
    return tl.reshape(b, (SLOTS, b.shape[0] // SLOTS, b.shape[1]))


@triton.jit
def _store(p, b, m):
    """Store `[1, BLOCK_L, BLOCK_W]` in the pointer's dtype."""
    tl.store(p, tl.reshape(b, (b.shape[1], b.shape[2])).to(p.dtype.element_ty), mask=m)


@triton.jit
def neighbor_attention_forward_kernel(
    # Pointers
    query_ptr,  # (B, L, D)
    key_ptr,  # (B, L, D)
    value_ptr,  # (B, L, D); the same as key_ptr where values lie behind their keys, and so with pads and gradients
    pad_key_ptr,  # (D), contiguous, or None
    pad_value_ptr,  # (D), contiguous, or None
    key_mask_ptr,  # (B, L), contiguous, uint8: 0 where a key takes no part; or None
    out_ptr,  # (B, L, D), contiguous
    # Sizes
    heads,
    scale,
    # Strides
    stride_q_b,
    stride_q_l,
    stride_k_b,
    stride_k_l,
    stride_v_b,
    stride_v_l,
    # Constants
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLUMNS: tl.constexpr,
    STEP_ROWS: tl.constexpr,
    STEP_COLUMNS: tl.constexpr,
    CENTER: tl.constexpr,
    WIDTH: tl.constexpr,  # features of a head
    BEHIND: tl.constexpr,  # D where values lie behind their keys, and pads and gradients likewise; else 0
    HAS_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Attend from every location of a grid to its window.

    Grid: (B heads). A program owns one head of one image: the whole grid, the slots of its window in registers, and the
    head's features in chunks of BLOCK_W, once for the scores and once for the sums. Saves nothing: the backward makes
    the weights again.
    """
    i_b = (tl.program_id(0) // heads).to(tl.int64)
    i_h = tl.program_id(0) % heads
    KEYS: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS - 1 + CENTER
    o_to, m_to, o_flat_to, m_flat_to = _neighbors(
        1, ROWS, COLUMNS, WINDOW_ROWS, WINDOW_COLUMNS, STEP_ROWS, STEP_COLUMNS, CENTER, SLOTS, BLOCK_L
    )
    m_to = _takes_part(key_mask_ptr, i_b, o_to, m_to, ROWS * COLUMNS)
    m_flat_to = _takes_part(key_mask_ptr, i_b, o_flat_to, m_flat_to, ROWS * COLUMNS)
    o_l = tl.arange(0, BLOCK_L)[:, None]
    b_missing = _missing(
        tl.arange(0, BLOCK_L)[None, :], ROWS, COLUMNS, WINDOW_ROWS, WINDOW_COLUMNS, STEP_ROWS, STEP_COLUMNS, KEYS
    )
    m_l = o_l < ROWS * COLUMNS

    p_q = query_ptr + i_b * stride_q_b + i_h * WIDTH + o_l * stride_q_l
    p_k = key_ptr + i_b * stride_k_b + i_h * WIDTH + o_flat_to * stride_k_l
    p_v = value_ptr + BEHIND + i_b * stride_v_b + i_h * WIDTH + o_flat_to * stride_v_l
    p_out = out_ptr + (i_b * (ROWS * COLUMNS) + o_l) * (heads * WIDTH) + i_h * WIDTH
    if HAS_PAD:  # one pointer a location: the load of a single row would have another layout and need conversions
        p_pad_k = pad_key_ptr + i_h * WIDTH + o_l * 0
        p_pad_v = pad_value_ptr + BEHIND + i_h * WIDTH + o_l * 0
        b_outside = _missing(o_l, ROWS, COLUMNS, WINDOW_ROWS, WINDOW_COLUMNS, STEP_ROWS, STEP_COLUMNS, KEYS)
        m_pad = m_l & (b_outside > 0)
    b_s = tl.zeros((SLOTS, BLOCK_L), tl.float32)
    b_s_pad = tl.zeros((1, BLOCK_L), tl.float32)
    for start in range(0, WIDTH, BLOCK_W):
        o_w = start + tl.arange(0, BLOCK_W)[None, :]
        m_w = o_w < WIDTH
        b_q = _load(p_q + o_w, m_l & m_w, 1)
        b_s += tl.sum(b_q * _load(p_k + o_w, m_flat_to & m_w, SLOTS), axis=2)
        if HAS_PAD:
            b_s_pad += tl.sum(b_q * _load(p_pad_k + o_w, m_pad & m_w, 1), axis=2)
    b_w, b_w_pad = _softmax(b_s * scale, m_to, b_s_pad * scale, b_missing, KEYS, HAS_PAD, key_mask_ptr is not None)

    for start in range(0, WIDTH, BLOCK_W):
        o_w = start + tl.arange(0, BLOCK_W)[None, :]
        m_w = o_w < WIDTH
        b_out = tl.sum(b_w[:, :, None] * _load(p_v + o_w, m_flat_to & m_w, SLOTS), axis=0)[None, :, :]
        if HAS_PAD:
            b_out += b_w_pad[:, :, None] * _load(p_pad_v + o_w, m_pad & m_w, 1)
        _store(p_out + o_w, b_out, m_l & m_w)


@triton.jit
def neighbor_attention_backward_kernel(
    # Pointers
    grad_out_ptr,  # (B, L, D)
    query_ptr,  # (B, L, D)
    key_ptr,  # (B, L, D)
    value_ptr,  # (B, L, D); the same as key_ptr where values lie behind their keys, and so with pads and gradients
    pad_key_ptr,  # (D), contiguous, or None
    pad_value_ptr,  # (D), contiguous, or None
    key_mask_ptr,  # (B, L), contiguous, uint8: 0 where a key takes no part; or None
    grad_query_ptr,  # (B, L, D), contiguous
    grad_key_ptr,  # (B, L, D)
    grad_value_ptr,  # (B, L, D), strides of grad_key_ptr
    grad_pads_ptr,  # (B, 2, D), contiguous, float32: each image's part of the gradients to the pads, or None
    # Sizes
    heads,
    scale,
    # Strides
    stride_grad_out_b,
    stride_grad_out_l,
    stride_q_b,
    stride_q_l,
    stride_k_b,
    stride_k_l,
    stride_v_b,
    stride_v_l,
    stride_grad_k_l,  # of an image, L times that
    # Constants
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLUMNS: tl.constexpr,
    STEP_ROWS: tl.constexpr,
    STEP_COLUMNS: tl.constexpr,
    CENTER: tl.constexpr,
    WIDTH: tl.constexpr,  # features of a head
    BEHIND: tl.constexpr,  # D where values lie behind their keys, and pads and gradients likewise; else 0
    HAS_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Make the gradients to query, key and value, and each image's part of those to the pads.

    Grid: (B heads). A program owns one head of one image, as in the forward. It makes the weights again, and fetches
    them from the neighbor's side for grad_key and grad_value with one gather in shared memory, so that no two programs
    or threads add to the same number. `sum_parts_kernel` adds the images' parts of the pads' gradients.
    """
    i_b = (tl.program_id(0) // heads).to(tl.int64)
    i_h = tl.program_id(0) % heads
    KEYS: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS - 1 + CENTER
    o_to, m_to, o_flat_to, m_flat_to = _neighbors(
        1, ROWS, COLUMNS, WINDOW_ROWS, WINDOW_COLUMNS, STEP_ROWS, STEP_COLUMNS, CENTER, SLOTS, BLOCK_L
    )
    m_to = _takes_part(key_mask_ptr, i_b, o_to, m_to, ROWS * COLUMNS)
    m_flat_to = _takes_part(key_mask_ptr, i_b, o_flat_to, m_flat_to, ROWS * COLUMNS)
    o_l = tl.arange(0, BLOCK_L)[:, None]
    b_missing = _missing(
        tl.arange(0, BLOCK_L)[None, :], ROWS, COLUMNS, WINDOW_ROWS, WINDOW_COLUMNS, STEP_ROWS, STEP_COLUMNS, KEYS
    )
    m_l = o_l < ROWS * COLUMNS

    p_g = grad_out_ptr + i_b * stride_grad_out_b + i_h * WIDTH
    p_q = query_ptr + i_b * stride_q_b + i_h * WIDTH
    p_k = key_ptr + i_b * stride_k_b + i_h * WIDTH + o_flat_to * stride_k_l
    p_v = value_ptr + BEHIND + i_b * stride_v_b + i_h * WIDTH + o_flat_to * stride_v_l
    if HAS_PAD:
        p_pad_k = pad_key_ptr + i_h * WIDTH + o_l * 0
        p_pad_v = pad_value_ptr + BEHIND + i_h * WIDTH + o_l * 0
        b_outside = _missing(o_l, ROWS, COLUMNS, WINDOW_ROWS, WINDOW_COLUMNS, STEP_ROWS, STEP_COLUMNS, KEYS)
        m_pad = m_l & (b_outside > 0)
    b_s = tl.zeros((SLOTS, BLOCK_L), tl.float32)
    b_dw = tl.zeros((SLOTS, BLOCK_L), tl.float32)
    b_s_pad = tl.zeros((1, BLOCK_L), tl.float32)
    b_dw_pad = tl.zeros((1, BLOCK_L), tl.float32)
    for start in range(0, WIDTH, BLOCK_W):
        o_w = start + tl.arange(0, BLOCK_W)[None, :]
        m_w = o_w < WIDTH
        b_q = _load(p_q + o_l * stride_q_l + o_w, m_l & m_w, 1)
        b_g = _load(p_g + o_l * stride_grad_out_l + o_w, m_l & m_w, 1)
        b_s += tl.sum(b_q * _load(p_k + o_w, m_flat_to & m_w, SLOTS), axis=2)
        b_dw += tl.sum(b_g * _load(p_v + o_w, m_flat_to & m_w, SLOTS), axis=2)
        if HAS_PAD:
            b_s_pad += tl.sum(b_q * _load(p_pad_k + o_w, m_pad & m_w, 1), axis=2)
            b_dw_pad += tl.sum(b_g * _load(p_pad_v + o_w, m_pad & m_w, 1), axis=2)
    b_w, b_w_pad = _softmax(b_s * scale, m_to, b_s_pad * scale, b_missing, KEYS, HAS_PAD, key_mask_ptr is not None)

    b_mean = tl.sum(tl.where(m_to, b_w * b_dw, 0.0), axis=0)[None, :] + b_w_pad * b_dw_pad
    b_ds = tl.where(m_to, b_w * (b_dw - b_mean), 0.0) * scale
    b_ds_pad = b_w_pad * (b_dw_pad - b_mean) * scale

    # From here on a location is the neighbor: its slot n belongs to the location whose neighbor n it is.
    o_from, m_from, o_flat_from, m_flat_from = _neighbors(
        -1, ROWS, COLUMNS, WINDOW_ROWS, WINDOW_COLUMNS, STEP_ROWS, STEP_COLUMNS, CENTER, SLOTS, BLOCK_L
    )
    m_from = _takes_part(key_mask_ptr, i_b, tl.arange(0, BLOCK_L)[None, :], m_from, ROWS * COLUMNS)
    o_own = tl.arange(0, SLOTS * BLOCK_L)[:, None] % BLOCK_L
    m_flat_from = _takes_part(key_mask_ptr, i_b, o_own, m_flat_from, ROWS * COLUMNS)
    b_w_from = tl.where(m_from, tl.gather(b_w, o_from, axis=1), 0.0)
    b_ds_from = tl.where(m_from, tl.gather(b_ds, o_from, axis=1), 0.0)
    o_out = (i_b * (ROWS * COLUMNS) + o_l) * (heads * WIDTH) + i_h * WIDTH
    o_key = (i_b * (ROWS * COLUMNS) + o_l) * stride_grad_k_l + i_h * WIDTH
    for start in range(0, WIDTH, BLOCK_W):
        o_w = start + tl.arange(0, BLOCK_W)[None, :]
        m_w = o_w < WIDTH
        b_grad_query = tl.sum(b_ds[:, :, None] * _load(p_k + o_w, m_flat_to & m_w, SLOTS), axis=0)[None, :, :]
        if HAS_PAD:
            b_grad_query += b_ds_pad[:, :, None] * _load(p_pad_k + o_w, m_pad & m_w, 1)
            b_q = _load(p_q + o_l * stride_q_l + o_w, m_l & m_w, 1)
            b_g = _load(p_g + o_l * stride_grad_out_l + o_w, m_l & m_w, 1)
            p_pad = grad_pads_ptr + i_b * (2 * heads * WIDTH) + i_h * WIDTH + o_w
            tl.store(p_pad, tl.sum(b_ds_pad[:, :, None] * b_q, axis=1), mask=m_w)
            tl.store(p_pad + heads * WIDTH, tl.sum(b_w_pad[:, :, None] * b_g, axis=1), mask=m_w)
        _store(grad_query_ptr + o_out + o_w, b_grad_query, m_l & m_w)
        b_q_from = _load(p_q + o_flat_from * stride_q_l + o_w, m_flat_from & m_w, SLOTS)
        _store(grad_key_ptr + o_key + o_w, tl.sum(b_ds_from[:, :, None] * b_q_from, axis=0)[None, :, :], m_l & m_w)
        b_g_from = _load(p_g + o_flat_from * stride_grad_out_l + o_w, m_flat_from & m_w, SLOTS)
        _store(
            grad_value_ptr + BEHIND + o_key + o_w,
            tl.sum(b_w_from[:, :, None] * b_g_from, axis=0)[None, :, :],
            m_l & m_w,
        )

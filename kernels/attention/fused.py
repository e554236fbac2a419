"""Neighbour attention in Triton: one launch forward, one backward.

    a[l, m] = softmax over the neighbours m of l of <q[l], k[m]> * scale        out[l] = sum_m a[l, m] v[m]
    dv[m]   = sum_l a[l, m] g[l]          ds[l, m] = a[l, m] (<g[l], v[m]> - sum_m a[l, m] <g[l], v[m]>)
    dq[l]   = scale sum_m ds[l, m] k[m]   dk[m]    = scale sum_l ds[l, m] q[l]

A program owns one head of one image: its whole grid, eight neighbour slots a location, the head's width in chunks. The
n_pad neighbours outside the grid share one key and value, so they are one more slot of weight n_pad exp(<q, pad_key>).
Nothing is a matrix product: eight of L keys take part, so a dense L x L tile on the tensor cores would do L / 8 times
the arithmetic, round float32 to TF32 and spread a NaN to locations that cannot see it. The backward kernel needs the
weights the other way around, from the neighbour's side, and fetches them with one gather in shared memory. Bytes moved:
4 B L D forward, 7 B L D backward, times the element size; neighbours come from L1. Grids above 256 locations would need
several programs a head and a second pass over the weights; those stay in PyTorch.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from simsid.kernels.launch import launch, on_device


@triton.jit
def _step(o_slot, o_l, SIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The neighbour in a slot of a location, and whether both exist.

    Slot n of location l is the location at offset n from l (SIGN 1), or the one from which l is at offset n (SIGN -1).
    """
    o_cell = o_slot + (o_slot >= 4).to(tl.int32)  # 0 to 8 without the centre, 4
    i_to = o_l // COLUMNS + SIGN * (o_cell // 3 - 1)
    j_to = o_l % COLUMNS + SIGN * (o_cell % 3 - 1)
    m_to = (i_to >= 0) & (i_to < ROWS) & (j_to >= 0) & (j_to < COLUMNS) & (o_l < ROWS * COLUMNS)
    return tl.where(m_to, i_to * COLUMNS + j_to, 0), m_to


@triton.jit
def _neighbors(SIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr):
    """Neighbours and mask as `[8, BLOCK_L]`, for the weights, and as rows `[8 * BLOCK_L, 1]`, for loads."""
    o_to, m_to = _step(tl.arange(0, 8)[:, None], tl.arange(0, BLOCK_L)[None, :], SIGN, ROWS, COLUMNS)
    o_row = tl.arange(0, 8 * BLOCK_L)[:, None]
    o_row_to, m_row_to = _step(o_row // BLOCK_L, o_row % BLOCK_L, SIGN, ROWS, COLUMNS)
    return o_to, m_to, o_row_to, m_row_to


@triton.jit
def _missing(o_l, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """How many neighbours of a location lie outside the grid."""
    i = o_l // COLUMNS
    j = o_l % COLUMNS
    rows_seen = 3 - (i == 0).to(tl.int32) - (i == ROWS - 1).to(tl.int32)
    columns_seen = 3 - (j == 0).to(tl.int32) - (j == COLUMNS - 1).to(tl.int32)
    # Rows of the tile beyond the grid have no neighbour, like a location alone: that path keeps them finite.
    return tl.where(o_l < ROWS * COLUMNS, 9 - rows_seen * columns_seen, 8).to(tl.float32)


@triton.jit
def _softmax(b_s, m_to, b_s_pad, n_pad, HAS_PAD: tl.constexpr):
    """Weights [8, BLOCK_L] of the neighbours and [1, BLOCK_L] of all neighbours outside the grid together."""
    b_s = tl.where(m_to, b_s, float("-inf"))
    b_max = tl.max(b_s, axis=0)[None, :]
    if HAS_PAD:
        b_max = tl.maximum(b_max, tl.where(n_pad > 0, b_s_pad, float("-inf")))
    else:
        b_max = tl.where(n_pad == 8, 0.0, b_max)  # no neighbour at all: weights of zero, not 0 / 0
    b_w = tl.where(m_to, tl.exp(b_s - b_max), 0.0)
    b_sum = tl.sum(b_w, axis=0)[None, :]
    b_w_pad = tl.zeros_like(b_sum)
    if HAS_PAD:
        b_w_pad = tl.where(n_pad > 0, n_pad * tl.exp(b_s_pad - b_max), 0.0)
        b_sum += b_w_pad
    else:
        b_sum = tl.where(n_pad == 8, 1.0, b_sum)
    return b_w / b_sum, b_w_pad / b_sum


@triton.jit
def _load(p, m, SLOTS: tl.constexpr):
    """Load rows `[SLOTS * BLOCK_L, BLOCK_W]` as `[SLOTS, BLOCK_L, BLOCK_W]`, zeros where masked.

    Rows are loaded in two dimensions, because versions of Triton order the threads of a three-dimensional load
    differently, and those that spread them over the slots need shared memory at every step. Float32 at once: the
    interpreter's bf16 arithmetic is that of raw bits.
    """
    b = tl.load(p, mask=m, other=0.0).to(tl.float32)
    return tl.reshape(b, (SLOTS, b.shape[0] // SLOTS, b.shape[1]))


@triton.jit
def _store(p, b, m):
    """Store `[1, BLOCK_L, BLOCK_W]` in the pointer's dtype."""
    tl.store(p, tl.reshape(b, (b.shape[1], b.shape[2])).to(p.dtype.element_ty), mask=m)


@triton.jit
def neighbor_attention_forward_kernel(
    query_ptr,  # (B, L, D)
    key_ptr,  # (B, L, D)
    value_ptr,  # (B, L, D)
    pad_key_ptr,  # (D)
    pad_value_ptr,  # (D)
    out_ptr,  # (B, L, D), contiguous
    heads,
    scale,
    stride_q_b,
    stride_q_l,
    stride_k_b,
    stride_k_l,
    stride_v_b,
    stride_v_l,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_PAD: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    i_b = (tl.program_id(0) // heads).to(tl.int64)
    i_h = tl.program_id(0) % heads
    _, m_to, o_row_to, m_row_to = _neighbors(1, ROWS, COLUMNS, BLOCK_L)
    n_pad = _missing(tl.arange(0, BLOCK_L)[None, :], ROWS, COLUMNS)
    o_l = tl.arange(0, BLOCK_L)[:, None]
    m_l = o_l < ROWS * COLUMNS

    p_q = query_ptr + i_b * stride_q_b + i_h * WIDTH + o_l * stride_q_l
    p_k = key_ptr + i_b * stride_k_b + i_h * WIDTH + o_row_to * stride_k_l
    p_v = value_ptr + i_b * stride_v_b + i_h * WIDTH + o_row_to * stride_v_l
    p_out = out_ptr + (i_b * (ROWS * COLUMNS) + o_l) * (heads * WIDTH) + i_h * WIDTH
    if HAS_PAD:  # spread over the locations, or the load would bring a layout of its own and conversions to it
        p_pad_k = pad_key_ptr + i_h * WIDTH + o_l * 0
        p_pad_v = pad_value_ptr + i_h * WIDTH + o_l * 0
        m_pad = m_l & (_missing(o_l, ROWS, COLUMNS) > 0)
    b_s = tl.zeros((8, BLOCK_L), tl.float32)
    b_s_pad = tl.zeros((1, BLOCK_L), tl.float32)
    for start in range(0, WIDTH, BLOCK_W):
        o_w = start + tl.arange(0, BLOCK_W)[None, :]
        m_w = o_w < WIDTH
        b_q = _load(p_q + o_w, m_l & m_w, 1)
        b_s += tl.sum(b_q * _load(p_k + o_w, m_row_to & m_w, 8), axis=2)
        if HAS_PAD:
            b_s_pad += tl.sum(b_q * _load(p_pad_k + o_w, m_pad & m_w, 1), axis=2)
    b_w, b_w_pad = _softmax(b_s * scale, m_to, b_s_pad * scale, n_pad, HAS_PAD)

    for start in range(0, WIDTH, BLOCK_W):
        o_w = start + tl.arange(0, BLOCK_W)[None, :]
        m_w = o_w < WIDTH
        b_out = tl.sum(b_w[:, :, None] * _load(p_v + o_w, m_row_to & m_w, 8), axis=0)[None, :, :]
        if HAS_PAD:
            b_out += b_w_pad[:, :, None] * _load(p_pad_v + o_w, m_pad & m_w, 1)
        _store(p_out + o_w, b_out, m_l & m_w)


@triton.jit
def neighbor_attention_backward_kernel(
    grad_ptr,  # (B, L, D)
    query_ptr,  # (B, L, D)
    key_ptr,  # (B, L, D)
    value_ptr,  # (B, L, D)
    pad_key_ptr,  # (D)
    pad_value_ptr,  # (D)
    grad_query_ptr,  # (B, L, D), contiguous, like the next two
    grad_key_ptr,  # (B, L, D)
    grad_value_ptr,  # (B, L, D)
    grad_pads_ptr,  # (2, B, D) float32: each image's part of the gradients to pad_key and pad_value
    heads,
    scale,
    batch_features,
    stride_g_b,
    stride_g_l,
    stride_q_b,
    stride_q_l,
    stride_k_b,
    stride_k_l,
    stride_v_b,
    stride_v_l,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_PAD: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    i_b = (tl.program_id(0) // heads).to(tl.int64)
    i_h = tl.program_id(0) % heads
    _, m_to, o_row_to, m_row_to = _neighbors(1, ROWS, COLUMNS, BLOCK_L)
    n_pad = _missing(tl.arange(0, BLOCK_L)[None, :], ROWS, COLUMNS)
    o_l = tl.arange(0, BLOCK_L)[:, None]
    m_l = o_l < ROWS * COLUMNS

    p_g = grad_ptr + i_b * stride_g_b + i_h * WIDTH
    p_q = query_ptr + i_b * stride_q_b + i_h * WIDTH
    p_k = key_ptr + i_b * stride_k_b + i_h * WIDTH + o_row_to * stride_k_l
    p_v = value_ptr + i_b * stride_v_b + i_h * WIDTH + o_row_to * stride_v_l
    if HAS_PAD:
        p_pad_k = pad_key_ptr + i_h * WIDTH + o_l * 0
        p_pad_v = pad_value_ptr + i_h * WIDTH + o_l * 0
        m_pad = m_l & (_missing(o_l, ROWS, COLUMNS) > 0)
    b_s = tl.zeros((8, BLOCK_L), tl.float32)
    b_dw = tl.zeros((8, BLOCK_L), tl.float32)
    b_s_pad = tl.zeros((1, BLOCK_L), tl.float32)
    b_dw_pad = tl.zeros((1, BLOCK_L), tl.float32)
    for start in range(0, WIDTH, BLOCK_W):
        o_w = start + tl.arange(0, BLOCK_W)[None, :]
        m_w = o_w < WIDTH
        b_q = _load(p_q + o_l * stride_q_l + o_w, m_l & m_w, 1)
        b_g = _load(p_g + o_l * stride_g_l + o_w, m_l & m_w, 1)
        b_s += tl.sum(b_q * _load(p_k + o_w, m_row_to & m_w, 8), axis=2)
        b_dw += tl.sum(b_g * _load(p_v + o_w, m_row_to & m_w, 8), axis=2)
        if HAS_PAD:
            b_s_pad += tl.sum(b_q * _load(p_pad_k + o_w, m_pad & m_w, 1), axis=2)
            b_dw_pad += tl.sum(b_g * _load(p_pad_v + o_w, m_pad & m_w, 1), axis=2)
    b_w, b_w_pad = _softmax(b_s * scale, m_to, b_s_pad * scale, n_pad, HAS_PAD)

    b_mean = tl.sum(tl.where(m_to, b_w * b_dw, 0.0), axis=0)[None, :] + b_w_pad * b_dw_pad
    b_ds = tl.where(m_to, b_w * (b_dw - b_mean), 0.0) * scale
    b_ds_pad = b_w_pad * (b_dw_pad - b_mean) * scale

    # From here on a location is a neighbour: slot n of it holds what the location it is neighbour n of gives it.
    o_from, m_from, o_row_from, m_row_from = _neighbors(-1, ROWS, COLUMNS, BLOCK_L)
    b_w_from = tl.where(m_from, tl.gather(b_w, o_from, axis=1), 0.0)
    b_ds_from = tl.where(m_from, tl.gather(b_ds, o_from, axis=1), 0.0)
    o_out = (i_b * (ROWS * COLUMNS) + o_l) * (heads * WIDTH) + i_h * WIDTH
    for start in range(0, WIDTH, BLOCK_W):
        o_w = start + tl.arange(0, BLOCK_W)[None, :]
        m_w = o_w < WIDTH
        b_dq = tl.sum(b_ds[:, :, None] * _load(p_k + o_w, m_row_to & m_w, 8), axis=0)[None, :, :]
        if HAS_PAD:
            b_dq += b_ds_pad[:, :, None] * _load(p_pad_k + o_w, m_pad & m_w, 1)
            b_q = _load(p_q + o_l * stride_q_l + o_w, m_l & m_w, 1)
            b_g = _load(p_g + o_l * stride_g_l + o_w, m_l & m_w, 1)
            p_pad = grad_pads_ptr + i_b * (heads * WIDTH) + i_h * WIDTH + o_w
            tl.store(p_pad, tl.sum(b_ds_pad[:, :, None] * b_q, axis=1), mask=m_w)
            tl.store(p_pad + batch_features, tl.sum(b_w_pad[:, :, None] * b_g, axis=1), mask=m_w)
        _store(grad_query_ptr + o_out + o_w, b_dq, m_l & m_w)
        b_q_from = _load(p_q + o_row_from * stride_q_l + o_w, m_row_from & m_w, 8)
        _store(grad_key_ptr + o_out + o_w, tl.sum(b_ds_from[:, :, None] * b_q_from, axis=0)[None, :, :], m_l & m_w)
        b_g_from = _load(p_g + o_row_from * stride_g_l + o_w, m_row_from & m_w, 8)
        _store(grad_value_ptr + o_out + o_w, tl.sum(b_w_from[:, :, None] * b_g_from, axis=0)[None, :, :], m_l & m_w)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tile of one program: locations, features of a head at a time, warps."""

    block_l: int
    block_w: int
    num_warps: int


def plan(locations: int, width: int, element_size: int) -> Plan:
    """Choose the tile of a grid of `locations` and heads of `width` features.

    One 16-byte access a thread must cover the tile of locations x features exactly, and one warp a location's row.
    Then the eight slots of a feature lie in one thread, sums over slots need no exchange and sums over features only
    shuffles; a tile smaller than that puts slots into other warps, and the forward kernel goes from no barrier to 36.
    Eight warps: 255 registers a thread, of which the backward kernel takes up to 210; with 16 it spills.
    """
    block_l = triton.next_power_of_2(locations)
    vector = 16 // element_size
    block_w = min(triton.next_power_of_2(width), 32 * vector)
    num_warps = max(1, min(8, block_l, block_l * block_w // (32 * vector)))
    return Plan(block_l, min(block_w, max(1, 32 * vector * num_warps // block_l)), num_warps)


def _strided(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy where its last axis is strided, its start unaligned or 32-bit offsets too short.

    The vector width of the loads, and with it the order of the sums, follows the alignment: without the copy the bits
    of an image would depend on where in a larger batch it starts.
    """
    if tensor.stride(2) == 1 and tensor.shape[1] * tensor.stride(1) < 2**31:
        return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    rows: int,
    columns: int,
    heads: int,
) -> Tensor:
    B, L, D = query.shape
    out = query.new_empty((B, L, D))
    if not B:
        return out
    tile = plan(L, D // heads, query.element_size())
    query, key, value = _strided(query), _strided(key), _strided(value)
    with on_device(query):
        launch(
            neighbor_attention_forward_kernel,
            (B * heads,),
            num_warps=tile.num_warps,
            num_stages=1,
            query_ptr=query,
            key_ptr=key,
            value_ptr=value,
            pad_key_ptr=None if pad_key is None else pad_key.contiguous(),
            pad_value_ptr=None if pad_value is None else pad_value.contiguous(),
            out_ptr=out,
            heads=heads,
            scale=(D // heads) ** -0.5,
            stride_q_b=query.stride(0),
            stride_q_l=query.stride(1),
            stride_k_b=key.stride(0),
            stride_k_l=key.stride(1),
            stride_v_b=value.stride(0),
            stride_v_l=value.stride(1),
            ROWS=rows,
            COLUMNS=columns,
            WIDTH=D // heads,
            HAS_PAD=pad_key is not None,
            BLOCK_L=tile.block_l,
            BLOCK_W=tile.block_w,
        )
    return out


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    rows: int,
    columns: int,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, L, D = query.shape
    grad_query, grad_key, grad_value = (query.new_empty((B, L, D)) for _ in range(3))
    grad_pads = query.new_empty((2, B if pad_key is not None else 0, D), dtype=torch.float32)
    if not B:
        return grad_query, grad_key, grad_value, grad_pads
    tile = plan(L, D // heads, query.element_size())
    grad, query, key, value = _strided(grad), _strided(query), _strided(key), _strided(value)
    with on_device(query):
        launch(
            neighbor_attention_backward_kernel,
            (B * heads,),
            num_warps=tile.num_warps,
            num_stages=1,
            grad_ptr=grad,
            query_ptr=query,
            key_ptr=key,
            value_ptr=value,
            pad_key_ptr=None if pad_key is None else pad_key.contiguous(),
            pad_value_ptr=None if pad_value is None else pad_value.contiguous(),
            grad_query_ptr=grad_query,
            grad_key_ptr=grad_key,
            grad_value_ptr=grad_value,
            grad_pads_ptr=None if pad_key is None else grad_pads,
            heads=heads,
            scale=(D // heads) ** -0.5,
            batch_features=B * D,
            stride_g_b=grad.stride(0),
            stride_g_l=grad.stride(1),
            stride_q_b=query.stride(0),
            stride_q_l=query.stride(1),
            stride_k_b=key.stride(0),
            stride_k_l=key.stride(1),
            stride_v_b=value.stride(0),
            stride_v_l=value.stride(1),
            ROWS=rows,
            COLUMNS=columns,
            WIDTH=D // heads,
            HAS_PAD=pad_key is not None,
            BLOCK_L=tile.block_l,
            BLOCK_W=tile.block_w,
        )
    return grad_query, grad_key, grad_value, grad_pads


_library = torch.library.Library("simsid", "FRAGMENT")
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? pad_key, Tensor? pad_value, int rows, int columns, int heads"
for _schema in (
    f"neighbor_attention({_INPUTS}) -> Tensor",
    f"neighbor_attention_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
for _key in ("CUDA", "CPU"):
    _library.impl("neighbor_attention", _forward, _key)
    _library.impl("neighbor_attention_backward", _backward, _key)


@torch.library.register_fake("simsid::neighbor_attention", lib=_library)
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.register_fake("simsid::neighbor_attention_backward", lib=_library)
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, pad_key: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, _, D = query.shape
    grad_pads = query.new_empty((2, B if pad_key is not None else 0, D), dtype=torch.float32)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), grad_pads


class _NeighborAttention(torch.autograd.Function):
    """The forward op with the backward op as its gradient.

    Without `setup_context`, which torch.func would need: with it every call binds its signature anew.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pad_key: Tensor | None,
        pad_value: Tensor | None,
        rows: int,
        columns: int,
        heads: int,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, pad_key, pad_value)
        ctx.layout = (rows, columns, heads)
        return torch.ops.simsid.neighbor_attention(query, key, value, pad_key, pad_value, rows, columns, heads)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, pad_key, pad_value = ctx.saved_tensors
        # Gradients are on in here only under create_graph.
        backward = _Differentiable.apply if torch.is_grad_enabled() else torch.ops.simsid.neighbor_attention_backward
        *gradients, grad_pads = backward(grad, query, key, value, pad_key, pad_value, *ctx.layout)
        if pad_key is None:
            return (*gradients, None, None, None, None, None)
        grad_pad_key, grad_pad_value = grad_pads.sum(1)
        return (*gradients, grad_pad_key.to(pad_key.dtype), grad_pad_value.to(pad_value.dtype), None, None, None)


class _Differentiable(torch.autograd.Function):
    """The backward op in a graph of its own, where differentiating it is one clear error."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,  # noqa: ARG004
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pad_key: Tensor | None,
        pad_value: Tensor | None,
        rows: int,
        columns: int,
        heads: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ops.simsid.neighbor_attention_backward(
            grad, query, key, value, pad_key, pad_value, rows, columns, heads
        )

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> None:  # noqa: ARG004
        raise RuntimeError('neighbor_attention has no second derivative in Triton; use backend="torch" for it')


def neighbor_attention_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    heads: int,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
) -> Tensor:
    """Compute the op with the kernels of this file; arguments as `neighbor_attention_reference`, already checked."""
    tensors = (query, key, value, pad_key, pad_value)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _NeighborAttention.apply(*tensors, *grid, heads)
    return torch.ops.simsid.neighbor_attention(*tensors, *grid, heads)


def inspect_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield a name and a host call on meta tensors for the variants that presets and limits launch."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    cases = [
        ((4, 4), 512, 8, (fp32, bf16), (True, False)),  # SimSID
        ((4, 4), 128, 8, (fp16,), (True,)),
        ((2, 2), 2048, 8, (fp32, bf16), (True,)),  # SQUID
        ((3, 3), 256, 8, (fp32, bf16), (True,)),  # DigitAnatomy
        ((8, 8), 512, 8, (fp32, bf16), (True,)),
        ((16, 16), 512, 8, (fp32, bf16), (True,)),
        ((3, 5), 35, 5, (fp32, bf16), (True,)),  # nothing divisible
    ]
    for grid, features, heads, dtypes, pads in cases:
        for dtype, padded in itertools.product(dtypes, pads):
            tensor = torch.empty(2, grid[0] * grid[1], features, dtype=dtype, device="meta")
            pad = torch.empty(features, device="meta") if padded else None
            arguments = (tensor, tensor, tensor, pad, pad, *grid, heads)
            name = f"{grid[0]}x{grid[1]} D={features} {str(dtype)[6:]}{' pads' if padded else ''}"
            yield f"forward {name}", functools.partial(_forward, *arguments)
            yield f"backward {name}", functools.partial(_backward, tensor, *arguments)

"""What the op benchmarks compare: for each op its inputs, its least cost, and every way to compute it.

Needs PyTorch and Triton alone.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import roofline
import torch
from roofline import Cost
from shapes import Shape
from torch import Tensor, nn
from torch.nn import functional

from simsid.kernels import neighbor_attention, residual_layer_norm, space_aware_memory
from simsid.kernels.attention.reference import neighbor_index
from simsid.kernels.backend import why_not_triton

TOPK = 5
PASSES = ("forward", "backward", "both")
NEEDS_CUDA = "Triton kernels run on CUDA"
COMPILES_SLOWLY = "on a CPU each variant would compile C++ for minutes"

Call = Callable[..., Tensor]


class Variant(NamedTuple):
    """One way to compute an op: a function of the shape and device that returns the call to time."""

    build: Callable[[Shape, torch.device], Call]
    not_on_cpu: str | None = None  # the reason to skip it there


class Op(NamedTuple):
    """One op; `inputs` returns the tensors of a shape, all of which get gradients."""

    inputs: Callable[[Shape, torch.dtype, torch.device], tuple[Tensor, ...]]
    variants: dict[str, Variant]
    cost: Callable[[Shape, int], tuple[Cost, Cost] | None]  # forward and backward, for an element size


def why_skipped(variant: Variant, device: torch.device) -> str | None:
    """Return why `variant` cannot be timed here, or None."""
    if device.type != "cuda":
        return variant.not_on_cpu
    return why_not_triton(device) if variant.not_on_cpu == NEEDS_CUDA else None


def least_cost(op: Op, shape: Shape, element_size: int, which: str) -> Cost | None:
    """Return the least cost of a pass, or None where projections in cuBLAS bound the op."""
    costs = op.cost(shape, element_size)
    if costs is None:
        return None
    forward, backward = costs
    return {"forward": forward, "backward": backward, "both": forward + backward}[which]


def _randn(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def _same(call: Call) -> Callable[[Shape, torch.device], Call]:
    return lambda *_: call


def _compiled(build: Callable[[Shape, torch.device], Call]) -> Callable[[Shape, torch.device], Call]:
    def compiled(shape: Shape, device: torch.device) -> Call:
        from torch._functorch import config

        # A backward pass timed alone runs many times on the same saved tensors, which it would otherwise overwrite.
        config.donated_buffer = False
        return torch.compile(build(shape, device), fullgraph=True, dynamic=False)

    return compiled


# Space-aware memory ------------------------------------------------------------------------------------------------


def _memory_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    B, L, N, D = shape.images, shape.locations, shape.items, shape.features
    query = _randn(B, L, D, dtype=dtype, device=device, seed=1)
    memory = _randn(L, N, D, dtype=torch.float32, device=device, seed=2) / math.sqrt(D)
    return query, memory  # a parameter stays float32 under autocast


def _memory(backend: str) -> Call:
    return lambda query, memory: space_aware_memory(query, memory, TOPK, backend=backend)


def _memory_loop(query: Tensor, memory: Tensor) -> Tensor:
    """Look up one location after the other, as the released code of SQUID and SimSID does."""
    locations = range(query.shape[1])
    each = [space_aware_memory(query[:, i : i + 1], memory[i : i + 1], TOPK, backend="torch") for i in locations]
    return torch.cat(each, dim=1)


def _memory_cost(shape: Shape, size: int) -> tuple[Cost, Cost]:
    sizes = (shape.images, shape.locations, shape.items, shape.features, TOPK)
    forward = roofline.space_aware_memory_forward(*sizes, query_bytes=size, save=False)
    return forward, roofline.space_aware_memory_backward(*sizes, query_bytes=size)


# Neighbor attention ------------------------------------------------------------------------------------------------


def _attention_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    B, L, D = shape.images, shape.locations, shape.features
    rows = [_randn(B, L, D, dtype=dtype, device=device, seed=seed) for seed in (1, 2, 3)]
    return *rows, *(_randn(D, dtype=torch.float32, device=device, seed=seed) for seed in (4, 5))


def _attention(backend: str) -> Callable[[Shape, torch.device], Call]:
    def build(shape: Shape, _: torch.device) -> Call:
        def call(query: Tensor, key: Tensor, value: Tensor, pad_key: Tensor, pad_value: Tensor) -> Tensor:
            return neighbor_attention(
                query, key, value, shape.grid, shape.heads, pad_key=pad_key, pad_value=pad_value, backend=backend
            )

        return call

    return build


def _attention_loop(shape: Shape, device: torch.device) -> Call:
    L, heads = shape.locations, shape.heads
    index = neighbor_index(shape.grid)
    inside = [row[row < L].to(device) for row in index]
    missing = (index == L).sum(1).tolist()

    def call(query: Tensor, key: Tensor, value: Tensor, pad_key: Tensor, pad_value: Tensor) -> Tensor:
        B, _, D = query.shape

        def window(x: Tensor, pad: Tensor, location: int) -> Tensor:
            pads = pad.to(x.dtype).expand(B, missing[location], D)
            return torch.cat([x[:, inside[location]], pads], dim=1).unflatten(-1, (heads, -1))

        out = []
        for location in range(L):
            q = query[:, location].unflatten(-1, (heads, -1))
            k, v = window(key, pad_key, location), window(value, pad_value, location)
            weight = torch.softmax(torch.einsum("bhd,bwhd->bhw", q, k) * (D // heads) ** -0.5, dim=-1)
            out.append(torch.einsum("bhw,bwhd->bhd", weight, v).flatten(1))
        return torch.stack(out, dim=1)

    return call


def _log_counts(shape: Shape, device: torch.device) -> Tensor:
    """Return `[L, L + 1]`: 0 where a key is a neighbor, log(n_pad) in the column of the pads, -inf elsewhere."""
    L = shape.locations
    index = neighbor_index(shape.grid)
    return torch.stack([torch.bincount(row, minlength=L + 1) for row in index]).float().log().to(device)


def _with_extra_key(query: Tensor, key: Tensor, value: Tensor, pad_key: Tensor, pad_value: Tensor, heads: int) -> list:
    """Append the pads as one more key and value, and split the heads: `[B, heads, L or L + 1, D / heads]`."""
    B, _, D = query.shape
    key = torch.cat([key, pad_key.to(key.dtype).expand(B, 1, D)], dim=1)
    value = torch.cat([value, pad_value.to(value.dtype).expand(B, 1, D)], dim=1)
    return [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value)]


def _attention_sdpa(shape: Shape, device: torch.device) -> Call:
    counts = _log_counts(shape, device)

    def call(*tensors: Tensor) -> Tensor:
        q, k, v = _with_extra_key(*tensors, shape.heads)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=counts.to(q.dtype))
        return out.transpose(1, 2).flatten(-2)

    return call


def _attention_flex(shape: Shape, device: torch.device) -> Call:
    """Mask all but the neighbors, and add log(n_pad) to the score of the extra key."""
    # Here, because the import takes seconds.
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    L, counts = shape.locations, _log_counts(shape, device)

    def sees(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return counts[i, j] > float("-inf")

    def weigh(score: Tensor, _b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + counts[i, j]

    mask = create_block_mask(sees, B=None, H=None, Q_LEN=L, KV_LEN=L + 1, device=device)

    def call(*tensors: Tensor) -> Tensor:
        q, k, v = _with_extra_key(*tensors, shape.heads)
        return flex_attention(q, k, v, score_mod=weigh, block_mask=mask).transpose(1, 2).flatten(-2)

    return call


def _attention_cost(shape: Shape, size: int) -> tuple[Cost, Cost]:
    sizes = (shape.images, shape.grid, shape.features)
    forward = roofline.neighbor_attention_forward(*sizes, element_bytes=size)
    return forward, roofline.neighbor_attention_backward(*sizes, element_bytes=size)


# The attention layer: the op with its four projections -------------------------------------------------------------


def _layer_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    B, L, D = shape.images, shape.locations, shape.features
    scale = {"dtype": dtype, "device": device}
    features = [_randn(B, L, D, seed=seed, **scale) for seed in (1, 2)]
    weights = [_randn(rows, D, seed=seed, **scale) / math.sqrt(D) for rows, seed in ((3 * D, 3), (D, 4))]
    return *features, *weights, *(_randn(rows, seed=seed, **scale) for rows, seed in ((3 * D, 5), (D, 6)))


def _layer(backend: str) -> Callable[[Shape, torch.device], Call]:
    def build(shape: Shape, _: torch.device) -> Call:
        def call(f: Tensor, n: Tensor, into: Tensor, out: Tensor, into_bias: Tensor, out_bias: Tensor) -> Tensor:
            D = shape.features
            query = functional.linear(f, into[:D], into_bias[:D])
            pads = into_bias[D:]
            key_value = functional.linear(n, into[D:], pads)
            core = neighbor_attention(query, key_value, None, shape.grid, shape.heads, pad_key=pads, backend=backend)
            return functional.linear(core, out, out_bias)

        return call

    return build


def _layer_windows(shape: Shape, device: torch.device) -> Call:
    """Unfold 3x3 windows with a border of zeros for nn.MultiheadAttention: each key is projected once per window."""
    around = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8], device=device)
    D, heads = shape.features, shape.heads
    module = nn.MultiheadAttention(D, heads, batch_first=True, device="meta")

    def call(f: Tensor, n: Tensor, into: Tensor, out: Tensor, into_bias: Tensor, out_bias: Tensor) -> Tensor:
        windows = functional.unfold(n.transpose(1, 2).unflatten(-1, shape.grid), 3, padding=1).unflatten(1, (D, 9))
        keys = windows[:, :, around].permute(0, 3, 2, 1).flatten(0, 1)
        state = {"in_proj_weight": into, "in_proj_bias": into_bias, "out_proj.weight": out, "out_proj.bias": out_bias}
        query = f.reshape(-1, 1, D)
        return torch.func.functional_call(module, state, (query, keys, keys), {"need_weights": False})[0].view_as(f)

    return call


# Residual + LayerNorm + ReLU ---------------------------------------------------------------------------------------


def _norm_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    B, L, D = shape.images, shape.locations, shape.features
    rows = [_randn(B, L, D, dtype=dtype, device=device, seed=seed) for seed in (1, 2)]
    return *rows, *(_randn(D, dtype=torch.float32, device=device, seed=seed) for seed in (3, 4))


def _norm(backend: str) -> Call:
    return lambda *tensors: residual_layer_norm(*tensors, backend=backend)


def _norm_cost(shape: Shape, size: int) -> tuple[Cost, Cost]:
    row = shape.images * shape.locations * shape.features
    return Cost(3 * row * size, 8 * row, launches=1), Cost(5 * row * size, 12 * row, launches=1)


FUSED = "fused"
REFERENCE = "batched"  # the variant that the others must agree with and that the speed-up compares with


def _variants(
    batched: Callable[[Shape, torch.device], Call], fused: Callable[[Shape, torch.device], Call]
) -> dict[str, Variant]:
    """Return the variants that every op has."""
    return {
        REFERENCE: Variant(batched),
        "batched, torch.compile": Variant(_compiled(batched), not_on_cpu=COMPILES_SLOWLY),
        FUSED: Variant(fused, not_on_cpu=NEEDS_CUDA),
    }


OPS = {
    "space_aware_memory": Op(
        _memory_inputs,
        {
            "loop over locations": Variant(_same(_memory_loop)),
            **_variants(_same(_memory("torch")), _same(_memory("triton"))),
        },
        _memory_cost,
    ),
    "neighbor_attention": Op(
        _attention_inputs,
        {
            "loop over locations": Variant(_attention_loop),
            **_variants(_attention("torch"), _attention("triton")),
            "SDPA with an extra key": Variant(_attention_sdpa),
            "FlexAttention, torch.compile": Variant(_compiled(_attention_flex), not_on_cpu=COMPILES_SLOWLY),
        },
        _attention_cost,
    ),
    "neighbor_attention_layer": Op(
        _layer_inputs,
        {"unfold + nn.MultiheadAttention": Variant(_layer_windows), **_variants(_layer("torch"), _layer("triton"))},
        lambda *_: None,  # the projections bound it, and cuBLAS computes them
    ),
    "residual_layer_norm": Op(_norm_inputs, _variants(_same(_norm("torch")), _same(_norm("triton"))), _norm_cost),
}

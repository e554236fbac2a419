"""Space-aware memory with Gumbel shrinkage in plain PyTorch: the reference that fused kernels are tested against."""

import torch
from torch import Tensor

ZERO_SQUARE = 1e-24  # a row of features with a square up to here counts as zero


def shrink(
    logits: Tensor, p: Tensor, topk: int, threshold: str, item_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Keep the top-k of each row of `p`, zero the rest, divide by the sum; ties at rank k: lowest index first.

    The order comes from `logits`, which rank as `p` does but do not tie where the softmax underflows.

    Args:
        logits: `[..., N]`.
        p: `[..., N]`, their softmax; 0 for masked items.
        topk: k, 1 or more.
        threshold: `"inclusive"` or `"exclusive"`.
        item_mask: bool, of a shape that broadcasts to that of `logits`; False for items that no row may keep.

    Returns:
        The weights `[..., N]`, and the indices `[..., min(k, N)]` of the largest logits, largest first; masked items
        come last.
    """
    k = min(topk, p.shape[-1])
    ordered, index = torch.sort(logits, dim=-1, descending=True, stable=True)
    if item_mask is None:
        last = ordered[..., k - 1 : k]
    else:
        # Behind all others, even those of minus infinity, in whose score alone a masked item would tie.
        valid = item_mask.expand(logits.shape)
        position = torch.sort(~valid.gather(-1, index), dim=-1, stable=True).indices
        ordered, index = ordered.gather(-1, position), index.gather(-1, position)
        last = ordered.gather(-1, (valid.sum(-1, keepdim=True).clamp(max=k) - 1).clamp_min(0))
    index = index[..., :k]
    if threshold == "inclusive":
        kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, index, True)
    else:
        kept = logits > last
    if item_mask is not None:
        kept = kept & item_mask
    w = torch.where(kept, p, 0.0)
    total = w.sum(-1, keepdim=True)
    # Where no item is kept the weights are 0, but those of a row with a NaN are NaN: 0 p gives both.
    return torch.where(kept.any(-1, keepdim=True), w / total, 0.0 * p), index


def normalize(rows: Tensor) -> Tensor:
    """Divide `[..., D]` by the norms of its rows; a row of zeros stays, and gets no gradient."""
    square = (rows * rows).sum(-1, keepdim=True)
    zero = square <= ZERO_SQUARE
    # The root of a zero has an infinite derivative, which would give NaN even where it is not selected.
    return torch.where(zero, 0.0, rows / torch.where(zero, 1.0, square).sqrt())


def select(
    query: Tensor,
    memory: Tensor,
    topk: int,
    threshold: str,
    noise: Tensor | None,
    temperature: float,
    similarity: str = "dot",
    item_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the items `[L, N, D]`, the probabilities and the weights `[B, L, N]`, and the top-k indices.

    In float32 or wider; autocast must be off. Arguments as of `op.py`, already checked. The weights and the indices
    have no gradient.
    """
    dtype = torch.promote_types(torch.promote_types(query.dtype, memory.dtype), torch.float32)
    z, M = query.to(dtype), memory.to(dtype)
    M = M.expand(z.shape[1], -1, -1)
    if item_mask is not None:
        M = torch.where(item_mask[..., None], M, 0.0)  # 0 times what is not finite would be NaN
    cosine = similarity == "cosine"
    s = torch.einsum("bld,lnd->bln", normalize(z) if cosine else z, normalize(M) if cosine else M)
    logits = s if noise is None else s + noise.detach().to(dtype)
    logits = logits / temperature
    if item_mask is not None:
        # In a location without any valid item 0 instead: a row of minus infinity would make every gradient NaN.
        logits = torch.where(item_mask, logits, torch.where(item_mask.any(-1, keepdim=True), -torch.inf, 0.0))
    p = torch.softmax(logits, dim=-1)
    if item_mask is not None:
        p = torch.where(item_mask, p, 0.0)
    # Detached, and not under no_grad, which lets the tangents of forward mode through.
    w, index = shrink(logits.detach(), p.detach(), topk, threshold, item_mask)
    return M, p, w, index


def space_aware_memory_reference(
    query: Tensor,
    memory: Tensor,
    topk: int,
    threshold: str,
    noise: Tensor | None,
    temperature: float,
    similarity: str = "dot",
    item_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the op of `op.py` in float32 or wider, with autocast off; arguments already checked.

    Returns:
        The output `[B, L, D]`, the weights of all items `[B, L, N]`, and the top-k indices `[B, L, min(k, N)]`.
    """
    with torch.autocast(query.device.type, enabled=False):
        M, p, w, index = select(query, memory, topk, threshold, noise, temperature, similarity, item_mask)
        # Straight-through: adding zeros changes no bit of w, and their gradient is that of p. Unlike a custom
        # autograd.Function this serves torch.compile, torch.func, forward mode and second derivatives alike.
        out = torch.einsum("bln,lnd->bld", w + (p - p.detach()), M)
    return out.to(query.dtype), w, index

"""Space-aware memory with Gumbel shrinkage in plain PyTorch: the reference that fused kernels are tested against."""

import torch
from torch import Tensor


def shrink(logits: Tensor, p: Tensor, topk: int, threshold: str) -> tuple[Tensor, Tensor]:
    """Keep the top-k of each row of `p`, zero the rest, divide by the sum; ties at rank k: lowest index first.

    The order comes from `logits`, which rank as `p` does but do not tie where the softmax underflows.

    Args:
        logits: `[..., N]`.
        p: `[..., N]`, their softmax.
        topk: k, 1 or more.
        threshold: `"inclusive"` or `"exclusive"`.

    Returns:
        The weights `[..., N]`, and the indices `[..., min(k, N)]` of the largest logits, largest first.
    """
    k = min(topk, p.shape[-1])
    ordered, index = torch.sort(logits, dim=-1, descending=True, stable=True)
    index = index[..., :k]
    if threshold == "inclusive":
        kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, index, True)
    else:
        kept = logits > ordered[..., k - 1 : k]
    w = torch.where(kept, p, 0.0)
    total = w.sum(-1, keepdim=True)
    # Where no item is kept the weights are 0, but those of a row with a NaN are NaN: 0 p gives both.
    return torch.where(kept.any(-1, keepdim=True), w / total, 0.0 * p), index


def space_aware_memory_reference(
    query: Tensor, memory: Tensor, topk: int, threshold: str, noise: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the op of `op.py` in float32 or wider, with autocast off; arguments already checked.

    Returns:
        The output `[B, L, D]`, the weights of all items `[B, L, N]`, and the top-k indices `[B, L, min(k, N)]`.
    """
    dtype = torch.promote_types(torch.promote_types(query.dtype, memory.dtype), torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        z, M = query.to(dtype), memory.to(dtype)
        M = M.expand(z.shape[1], -1, -1)
        s = torch.einsum("bld,lnd->bln", z, M)
        logits = s if noise is None else s + noise.detach().to(dtype)
        logits = logits / temperature
        p = torch.softmax(logits, dim=-1)
        # Detached, and not under no_grad, which lets the tangents of forward mode through.
        w, index = shrink(logits.detach(), p.detach(), topk, threshold)
        # Straight-through: adding zeros changes no bit of w, and their gradient is that of p. Unlike a custom
        # autograd.Function this serves torch.compile, torch.func, forward mode and second derivatives alike.
        out = torch.einsum("bln,lnd->bld", w + (p - p.detach()), M)
    return out.to(query.dtype), w, index

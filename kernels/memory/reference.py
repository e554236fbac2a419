"""Space-aware memory with Gumbel shrinkage in plain PyTorch: the truth that fused kernels are tested against."""

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    """Return `w`; hand its gradient to `p` unchanged."""

    @staticmethod
    def forward(ctx: object, p: Tensor, w: Tensor) -> Tensor:  # noqa: ARG004
        return w.view_as(w)

    @staticmethod
    def backward(ctx: object, dw: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return dw, None


def shrink(logits: Tensor, p: Tensor, topk: int, threshold: str) -> Tensor:
    """Keep the top-k of each row of `p`, zero the rest, divide by the sum; ties at the k-th place: lowest index first.

    The order is read off `logits`, which rank as `p` does but do not tie where the softmax underflows.
    """
    k = min(topk, p.shape[-1])
    ordered, index = torch.sort(logits, dim=-1, descending=True, stable=True)
    if threshold == "inclusive":
        kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, index[..., :k], True)
    else:
        kept = logits > ordered[..., k - 1 : k]
    w = torch.where(kept, p, 0.0)
    total = w.sum(-1, keepdim=True)
    # Where nothing stays the weights are 0, but those of a row with a NaN are NaN: 0 p says both.
    return torch.where(kept.any(-1, keepdim=True), w / total, 0.0 * p)


def space_aware_memory_reference(
    query: Tensor, memory: Tensor, topk: int, threshold: str, noise: Tensor | None, temperature: float
) -> Tensor:
    """Compute `out = w M` of the op's docstring, similarity and probabilities in float32 or better, autocast off."""
    dtype = torch.promote_types(torch.promote_types(query.dtype, memory.dtype), torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        z, M = query.to(dtype), memory.to(dtype)
        M = M.expand(z.shape[1], -1, -1)
        s = torch.einsum("bld,lnd->bln", z, M)
        logits = s if noise is None else s + noise.detach().to(dtype)
        logits = logits / temperature
        p = torch.softmax(logits, dim=-1)
        with torch.no_grad():
            w = shrink(logits, p, topk, threshold)
        out = torch.einsum("bln,lnd->bld", _StraightThrough.apply(p, w), M)
    return out.to(query.dtype)

"""The space-aware memory in PyTorch on a CPU, with the gradient of the items as one matrix product.

    forward    as the reference, bit for bit
    backward   dw = g M^T;  ds = p (dw - <p, dw>) / temperature;  dz = ds M;  dM = [ds, w]^T [z, g]

Autograd computes the two parts of dM separately, that of the similarity transposed, and adds them: three passes over
the largest tensor of the op, of which the sum of different strides takes about as long as both products.
"""

from typing import Any

import torch
from torch import Tensor

from simsid.kernels.backend import why_not_differentiable
from simsid.kernels.library import needs_gradient
from simsid.kernels.memory.reference import select, space_aware_memory_reference


class _JointGradient(torch.autograd.Function):
    """The reference for the dot product without a mask; a second derivative goes through the reference itself."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        memory: Tensor,
        noise: Tensor | None,
        topk: int,
        threshold: str,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.options = topk, threshold, temperature
        with torch.autocast(query.device.type, enabled=False):
            M, p, w, index = select(query, memory, topk, threshold, noise, temperature)
            out = torch.einsum("bln,lnd->bld", w, M).to(query.dtype)
        ctx.save_for_backward(query, memory, noise, p, w)
        ctx.mark_non_differentiable(w, index)
        return out, w, index

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        query, memory, noise, p, w = ctx.saved_tensors
        topk, threshold, temperature = ctx.options
        needs = ctx.needs_input_grad[:2]
        with torch.autocast(query.device.type, enabled=False):
            if torch.is_grad_enabled():  # create_graph: p and w are constants here
                out = space_aware_memory_reference(query, memory, topk, threshold, noise, temperature)[0]
                inputs = [tensor for tensor, need in zip((query, memory), needs) if need]
                found = iter(torch.autograd.grad(out, inputs, grad_out, create_graph=True))
                return *(next(found) if need else None for need in needs), *(None,) * 4
            z, g = (tensor.to(p.dtype).transpose(0, 1) for tensor in (query, grad_out))
            M = memory.to(p.dtype).expand(len(z), -1, -1)
            p, w = p.transpose(0, 1), w.transpose(0, 1)
            dw = torch.bmm(g, M.transpose(1, 2))
            ds = p * (dw - (p * dw).sum(-1, keepdim=True)) / temperature
            grad_query = grad_memory = None
            if needs[0]:
                grad_query = torch.bmm(ds, M).transpose(0, 1).to(query.dtype)
            if needs[1]:
                grad_memory = torch.bmm(torch.cat([ds, w], 1).transpose(1, 2), torch.cat([z, g], 1))
                grad_memory = grad_memory.sum_to_size(memory.shape).to(memory.dtype)
        return grad_query, grad_memory, *(None,) * 4


def space_aware_memory_torch(
    query: Tensor,
    memory: Tensor,
    topk: int,
    threshold: str,
    noise: Tensor | None,
    temperature: float,
    similarity: str,
    item_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `space_aware_memory_reference` does, on a CPU with the joint gradient where it is defined."""
    plain = query.device.type == "cpu" and similarity == "dot" and item_mask is None
    if plain and needs_gradient(query, memory) and not torch.compiler.is_compiling() and not why_not_differentiable():
        return _JointGradient.apply(query, memory, noise, topk, threshold, temperature)
    return space_aware_memory_reference(query, memory, topk, threshold, noise, temperature, similarity, item_mask)

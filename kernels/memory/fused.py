"""Registration and gradient of the space-aware memory's kernels."""

import functools
from typing import Any

import torch
from torch import Tensor

from simsid.kernels.handles import Passes
from simsid.kernels.library import needs_gradient, register, run_backward
from simsid.kernels.memory.launchers import empty_gradients, empty_results, memory_backward, memory_forward, target_of


def _forward_fake(
    query: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    noise: Tensor | None,
    topk: int,
    exclusive: bool,
    cosine: bool,
    temperature: float,
    save: bool,
    weights: bool,
) -> list[Tensor]:
    """Return empty results of `memory_forward`."""
    out, saved, kept = empty_results(query, memory, topk, cosine, save, weights)
    return [out, *saved, *kept]


def _backward_fake(
    grad_out: Tensor,
    query: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    saved: list[Tensor],
    temperature: float,
    need_query: bool,
    need_memory: bool,
) -> tuple[Tensor, Tensor]:
    """Return empty results of `memory_backward`."""
    return empty_gradients(query, memory, need_query, need_memory)


_forward_op = register(
    "space_aware_memory(Tensor query, Tensor memory, Tensor? mask, Tensor? noise, int topk, bool exclusive, "
    "bool cosine, float temperature, bool save, bool weights) -> Tensor[]",
    memory_forward,
    _forward_fake,
)
_backward_op = register(
    "space_aware_memory_backward(Tensor grad_out, Tensor query, Tensor memory, Tensor? mask, Tensor[] saved, "
    "float temperature, bool need_query, bool need_memory) -> (Tensor, Tensor)",
    memory_backward,
    _backward_fake,
)


class _SpaceAwareMemory(torch.autograd.Function):
    """The forward op with the backward op as its straight-through gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        memory: Tensor,
        mask: Tensor | None,
        noise: Tensor | None,
        topk: int,
        exclusive: bool,
        cosine: bool,
        temperature: float,
        return_weights: bool,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        out, *saved = _forward_op(
            query, memory, mask, noise, topk, exclusive, cosine, temperature, True, return_weights
        )
        index, weight = saved[-2:] if return_weights else (None, None)
        ctx.save_for_backward(query, memory, mask, *saved[: 4 if cosine else 1])
        ctx.temperature = temperature
        if index is None or weight is None:
            return out
        ctx.mark_non_differentiable(index, weight)
        return out, index, weight

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _gradients(ctx.temperature, ctx.needs_input_grad[:2], grad_out, *ctx.saved_tensors)
        return *gradients, *(None,) * 5


def _gradients(
    temperature: float,
    needs: tuple[bool, bool],
    grad_out: Tensor,
    query: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    *saved: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, memory, mask and noise."""
    gradients = run_backward(
        "space_aware_memory", _backward_op, grad_out, query, memory, mask, list(saved), temperature, *needs
    )
    return *(gradient if need else None for gradient, need in zip(gradients, needs)), None, None


def space_aware_memory_fused(
    query: Tensor,
    memory: Tensor,
    topk: int,
    threshold: str,
    noise: Tensor | None,
    temperature: float,
    similarity: str,
    item_mask: Tensor | None,
    return_weights: bool,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Compute the op of `op.py`, whose checks are done, by the kernels."""
    cosine = similarity == "cosine"
    arguments = (query, memory, item_mask, noise, topk, threshold == "exclusive", cosine, temperature)
    if needs_gradient(query, memory):
        return _SpaceAwareMemory.apply(*arguments, return_weights)
    results = _forward_op(*arguments, False, return_weights)
    return (results[0], *results[-2:]) if return_weights else results[0]


def passes(query: Tensor, memory: Tensor, topk: int, exclusive: bool, cosine: bool, temperature: float) -> Passes:
    """Return the host code that a handle records, for the gradients that query and memory need."""
    target, save = target_of(query.device), needs_gradient(query, memory)
    needs = query.requires_grad, memory.requires_grad

    def forward(query: Tensor, memory: Tensor, mask: Tensor | None, noise: Tensor | None) -> tuple[Tensor | None, ...]:
        options = (topk, exclusive, cosine, temperature, save, False, target)
        out, *saved = memory_forward(query, memory, mask, noise, *options)
        return out, query, memory, mask, *saved

    def backward(
        grad_out: Tensor, query: Tensor, memory: Tensor, mask: Tensor | None, *saved: Tensor
    ) -> tuple[Tensor | None, ...]:
        gradients = memory_backward(grad_out, query, memory, mask, list(saved), temperature, *needs, target)
        return *gradients, None, None

    return forward, backward, functools.partial(_gradients, temperature, needs)

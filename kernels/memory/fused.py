"""Registration and gradient of the space-aware memory's kernels."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from simsid.kernels.library import needs_gradient, register, run_backward, usable, watched
from simsid.kernels.memory.handles import Recording, record
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


class Handle(NamedTuple):
    """The recorded passes of a call."""

    forward: Recording
    backward: Recording | None  # for a contiguous gradient of the output; None where no gradient is needed
    options: tuple[Any, ...]

    def launch(self, query: Tensor, memory: Tensor) -> Tensor:
        """Compute the op as it was recorded."""
        if self.backward is None:
            return self.forward.replay(query, memory)[0]
        return _SpaceAwareMemory.apply(query, memory, None, None, *self.options, self)


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
        handle: Handle | None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        if handle is None:
            out, *saved = _forward_op(
                query, memory, mask, noise, topk, exclusive, cosine, temperature, True, return_weights
            )
        else:
            out, *saved = handle.forward.replay(query, memory)
        index, weight = saved[-2:] if return_weights else (None, None)
        ctx.save_for_backward(query, memory, mask, *saved[: 4 if cosine else 1])
        ctx.temperature, ctx.handle = temperature, handle
        if index is None or weight is None:
            return out
        ctx.mark_non_differentiable(index, weight)
        return out, index, weight

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        query, memory, mask, *saved = ctx.saved_tensors
        recorded = None if ctx.handle is None or not all(needs) else ctx.handle.backward
        if recorded is not None and not torch.is_grad_enabled() and usable(grad_out) and not watched(grad_out):
            return *recorded.replay(grad_out, query, memory, *saved), *(None,) * 8
        gradients = run_backward(
            "space_aware_memory", _backward_op, grad_out, query, memory, mask, saved, ctx.temperature, *needs
        )
        return *(gradient if need else None for gradient, need in zip(gradients, needs)), *(None,) * 8


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
        return _SpaceAwareMemory.apply(*arguments, return_weights, None)
    results = _forward_op(*arguments, False, return_weights)
    return (results[0], *results[-2:]) if return_weights else results[0]


def make_handle(
    query: Tensor, memory: Tensor, topk: int, exclusive: bool, temperature: float, gradient: bool
) -> Handle | None:
    """Record the passes of a call; None where a call has to prepare its tensors, or needs one gradient alone."""
    one_gradient = gradient and not (query.requires_grad and memory.requires_grad)
    ready = query.is_contiguous() and memory.is_contiguous() and memory.shape[0] == query.shape[1] > 1
    if not query.shape[0] or not ready or one_gradient:
        return None
    target = target_of(query.device)

    def forward(tensors: list[Tensor]) -> list[Tensor]:
        return memory_forward(*tensors, None, None, topk, exclusive, False, temperature, gradient, False, target)

    def backward(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        grad_out, query, memory, p = tensors
        return memory_backward(grad_out, query, memory, None, [p], temperature, True, True, target)

    p = query.new_empty((*query.shape[:2], memory.shape[1]), dtype=torch.float32)
    first = record(forward, (query, memory))
    second = record(backward, (query, query, memory, p)) if gradient else None
    if first is None or (gradient and second is None):
        return None
    return Handle(first, second, (topk, exclusive, False, temperature, False))

"""Launchers and gradient of the space-aware memory."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from simsid.kernels.backend import fenced_stages
from simsid.kernels.launch import ceil_div, launch, on_device
from simsid.kernels.library import needs_gradient, register, run_backward
from simsid.kernels.memory.kernels import (
    memory_items_gradient_kernel,
    memory_joint_gradient_kernel,
    memory_query_gradient_kernel,
    memory_scores_kernel,
    memory_select_kernel,
    memory_softmax_gradient_kernel,
)
from simsid.kernels.memory.plan import (
    GradientPlan,
    plan_items_gradient,
    plan_joint_gradient,
    plan_query_gradient,
    plan_rows,
    plan_scores,
)


class Target(NamedTuple):
    """What the host code must know of the GPU and of PyTorch's settings."""

    precision: str  # of a product of two float32 numbers: "tf32x3", or "tf32" where PyTorch may use it too
    warp_groups: bool  # products are made by whole warp groups, for which the plans differ


def _target(device: torch.device) -> Target:
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    on_gpu = device.type == "cuda"
    return Target(precision, not on_gpu or torch.cuda.get_device_capability(device)[0] in (9, 10))


def _rows(tensor: Tensor, shared: bool) -> Tensor:
    """Make features adjacent, and for a shared memory one location with B L queries."""
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    return tensor.reshape(-1, 1, tensor.shape[-1]) if shared else tensor


def _constants(plan: GradientPlan, target: Target) -> dict[str, int | str]:
    """Return the constants of a gradient kernel."""
    return {
        "BLOCK_B": plan.block_b,
        "BLOCK_N": plan.block_n,
        "BLOCK_D": plan.block_d,
        "PRECISION": target.precision,
    }


def _scores(query: Tensor, memory: Tensor, target: Target) -> Tensor:
    """Return the partial sums `[splits, B, L, N]` of the products of queries and items."""
    B, L, D = query.shape
    N = memory.shape[1]
    plan = plan_scores(B, L, N, D, target.warp_groups)
    partial = query.new_empty(plan.splits, B, L, N, dtype=torch.float32)
    launch(
        memory_scores_kernel,
        (ceil_div(B, plan.block_b) * ceil_div(N, plan.block_n) * L, plan.splits),
        plan.num_warps,
        fenced_stages(plan.num_stages, target.warp_groups, query, memory),
        query_ptr=query,
        memory_ptr=memory,
        partial_ptr=partial,
        B=B,
        L=L,
        N=N,
        D=D,
        chunk=plan.chunk,
        stride_q_b=query.stride(0),
        stride_q_l=query.stride(1),
        stride_m_l=memory.stride(0),
        stride_m_n=memory.stride(1),
        BLOCK_N=plan.block_n,
        BLOCK_B=plan.block_b,
        BLOCK_D=plan.block_d,
        PRECISION=target.precision,
    )
    return partial


def memory_forward(
    query: Tensor,
    memory: Tensor,
    topk: int,
    exclusive: bool,
    noise: Tensor | None,
    temperature: float,
    save: bool,
    kept: tuple[Tensor, Tensor] | None = None,
    target: Target | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output and the probabilities, and fill `kept` with indices and weights if there is one.

    Without `save` the probabilities have no elements; with it they are `[B, L, N]`, negative where the item was kept,
    which is all that the backward needs.
    """
    out, p = _forward_fake(query, memory, topk, exclusive, noise, temperature, save)
    if not query.shape[0]:
        return out, p
    shared = memory.shape[0] == 1
    query, memory = _rows(query, shared), _rows(memory, False)
    B, L, D = query.shape
    N = memory.shape[1]
    plan = plan_rows(N, D, min(topk, N))
    index, weight = kept or (None, None)
    with on_device(query):
        partial = _scores(query, memory, target or _target(query.device))
        launch(
            memory_select_kernel,
            (B * L, ceil_div(D, plan.block_d)),
            plan.num_warps,
            1,
            partial_ptr=partial,
            noise_ptr=None if noise is None else noise.contiguous(),
            memory_ptr=memory,
            out_ptr=out,
            p_ptr=p if save else None,
            index_ptr=index,
            weight_ptr=weight,
            rows=B * L,
            L=L,
            N=N,
            D=D,
            temperature=temperature,
            stride_m_l=memory.stride(0),
            stride_m_n=memory.stride(1),
            SPLITS=partial.shape[0],
            TOPK=min(topk, N),
            EXCLUSIVE=exclusive,
            BLOCK_N=plan.block_n,
            TILES=plan.tiles,
            BLOCK_K=plan.block_k,
            BLOCK_D=plan.block_d,
        )
    return out, p


def memory_forward_weights(
    query: Tensor,
    memory: Tensor,
    topk: int,
    exclusive: bool,
    noise: Tensor | None,
    temperature: float,
    save: bool,
    target: Target | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return output and probabilities of `memory_forward`, indices and weights `[B, L, min(k, N)]`."""
    kept = _kept_fake(query, memory, topk)
    return *memory_forward(query, memory, topk, exclusive, noise, temperature, save, kept, target), *kept


def _softmax_gradient(partial: Tensor, p: Tensor, temperature: float) -> Tensor:
    """Return ds and the dense w, `[2, B, L, N]`, from the partial sums of dw."""
    splits, B, L, N = partial.shape
    coefficient = p.new_empty(2, B, L, N)
    plan = plan_rows(N, features=1, kept=1)  # the row alone
    launch(
        memory_softmax_gradient_kernel,
        (B * L,),
        plan.num_warps,
        1,
        partial_ptr=partial,
        p_ptr=p,
        coefficient_ptr=coefficient,
        rows=B * L,
        N=N,
        temperature=temperature,
        SPLITS=splits,
        BLOCK_N=plan.block_n,
        TILES=plan.tiles,
    )
    return coefficient


def memory_backward(
    grad_out: Tensor,
    query: Tensor,
    memory: Tensor,
    p: Tensor,
    temperature: float,
    need_query: bool,
    need_memory: bool,
    target: Target | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of query and memory; one that is not needed has no elements."""
    grad_query, grad_memory = _backward_fake(grad_out, query, memory, p, temperature, need_query, need_memory)
    if not query.shape[0]:
        return grad_query, grad_memory.zero_()
    shared = memory.shape[0] == 1
    grad_out, query, memory = _rows(grad_out, shared), _rows(query, shared), _rows(memory, False)
    B, L, D = query.shape
    N = memory.shape[1]
    target = target or _target(query.device)
    pointers = {"grad_out_ptr": grad_out, "query_ptr": query}
    sizes = {"B": B, "L": L, "N": N, "D": D}
    strides = {
        "stride_grad_out_b": grad_out.stride(0),
        "stride_grad_out_l": grad_out.stride(1),
        "stride_q_b": query.stride(0),
        "stride_q_l": query.stride(1),
    }
    memory_strides = {"stride_m_l": memory.stride(0), "stride_m_n": memory.stride(1)}
    joint = plan_joint_gradient(B) if need_query and need_memory else None
    with on_device(query):
        coefficient = _softmax_gradient(_scores(grad_out, memory, target), p, temperature)
        if joint is not None:
            launch(
                memory_joint_gradient_kernel,
                (ceil_div(D, joint.block_d), L),
                joint.num_warps,
                joint.num_stages,
                **pointers,
                memory_ptr=memory,
                coefficient_ptr=coefficient,
                grad_query_ptr=grad_query,
                grad_memory_ptr=grad_memory,
                **sizes,
                **strides,
                **memory_strides,
                **_constants(joint, target),
            )
            return grad_query, grad_memory
        if need_query:
            plan = plan_query_gradient(B, target.warp_groups)
            launch(
                memory_query_gradient_kernel,
                (ceil_div(B, plan.block_b) * ceil_div(D, plan.block_d), L),
                plan.num_warps,
                fenced_stages(plan.num_stages, target.warp_groups, query, memory),
                memory_ptr=memory,
                coefficient_ptr=coefficient,
                grad_query_ptr=grad_query,
                **sizes,
                **memory_strides,
                **_constants(plan, target),
            )
        if need_memory:
            plan = plan_items_gradient(B, target.warp_groups)
            launch(
                memory_items_gradient_kernel,
                (ceil_div(N, plan.block_n) * ceil_div(D, plan.block_d), L),
                plan.num_warps,
                fenced_stages(plan.num_stages, target.warp_groups, query, memory),
                **pointers,
                coefficient_ptr=coefficient,
                grad_memory_ptr=grad_memory,
                **sizes,
                **strides,
                **_constants(plan, target),
            )
    return grad_query, grad_memory


def _forward_fake(
    query: Tensor, memory: Tensor, topk: int, exclusive: bool, noise: Tensor | None, temperature: float, save: bool
) -> tuple[Tensor, Tensor]:
    """Return empty results of `memory_forward`."""
    out = query.new_empty(query.shape)
    return out, query.new_empty((*query.shape[:2], memory.shape[1]) if save else (0,), dtype=torch.float32)


def _kept_fake(query: Tensor, memory: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return empty indices and weights."""
    shape = (*query.shape[:2], min(topk, memory.shape[1]))
    return query.new_empty(shape, dtype=torch.int64), query.new_empty(shape, dtype=torch.float32)


def _forward_weights_fake(
    query: Tensor, memory: Tensor, topk: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return empty results of `memory_forward_weights`."""
    return *_forward_fake(query, memory, topk, *options), *_kept_fake(query, memory, topk)


def _backward_fake(
    grad_out: Tensor, query: Tensor, memory: Tensor, p: Tensor, temperature: float, need_query: bool, need_memory: bool
) -> tuple[Tensor, Tensor]:
    """Return empty results of `memory_backward`."""
    return query.new_empty(query.shape if need_query else (0,)), memory.new_empty(memory.shape if need_memory else (0,))


_INPUTS = "Tensor query, Tensor memory, int topk, bool exclusive, Tensor? noise, float temperature, bool save"
_forward_op = register(f"space_aware_memory({_INPUTS}) -> (Tensor, Tensor)", memory_forward, _forward_fake)
_forward_weights_op = register(
    f"space_aware_memory_weights({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    memory_forward_weights,
    _forward_weights_fake,
)
_backward_op = register(
    "space_aware_memory_backward(Tensor grad_out, Tensor query, Tensor memory, Tensor p, float temperature, "
    "bool need_query, bool need_memory) -> (Tensor, Tensor)",
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
        topk: int,
        exclusive: bool,
        noise: Tensor | None,
        temperature: float,
        return_weights: bool,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        op = _forward_weights_op if return_weights else _forward_op
        out, p, *kept = op(query, memory, topk, exclusive, noise, temperature, True)
        ctx.save_for_backward(query, memory, p)
        ctx.temperature = temperature
        if not return_weights:
            return out
        index, weight = kept
        ctx.mark_non_differentiable(index, weight)
        return out, index, weight

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        gradients = run_backward(
            "space_aware_memory", _backward_op, grad_out, *ctx.saved_tensors, ctx.temperature, *needs
        )
        return *(gradient if need else None for gradient, need in zip(gradients, needs)), *(None,) * 5


def space_aware_memory_fused(
    query: Tensor,
    memory: Tensor,
    topk: int,
    threshold: str,
    noise: Tensor | None,
    temperature: float,
    return_weights: bool,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Compute the op of `op.py`, whose checks are done, by the kernels."""
    arguments = (query, memory, topk, threshold == "exclusive", noise, temperature)
    if needs_gradient(query, memory):
        return _SpaceAwareMemory.apply(*arguments, return_weights)
    if not return_weights:
        return _forward_op(*arguments, False)[0]
    out, _, index, weight = _forward_weights_op(*arguments, False)
    return out, index, weight

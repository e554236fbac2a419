"""Launchers of the space-aware memory's kernels: tensors in, tensors out, nothing of autograd."""

from typing import NamedTuple

import torch
from torch import Tensor

from simsid.kernels.backend import fenced_stages
from simsid.kernels.launch import ceil_div, launch, on_device
from simsid.kernels.memory.gradient_kernels import (
    memory_items_gradient_kernel,
    memory_joint_gradient_kernel,
    memory_query_gradient_kernel,
    memory_softmax_gradient_kernel,
)
from simsid.kernels.memory.kernels import memory_cosine_kernel, memory_scores_kernel, memory_select_kernel
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


def target_of(device: torch.device) -> Target:
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


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    """Return the outer strides of a query-like tensor `[B, L, D]`."""
    return {f"stride_{name}_b": tensor.stride(0), f"stride_{name}_l": tensor.stride(1)}


def _memory_strides(memory: Tensor) -> dict[str, int]:
    return {"stride_m_l": memory.stride(0), "stride_m_n": memory.stride(1)}


def _scores(
    query: Tensor, memory: Tensor, mask: Tensor | None, target: Target, squares: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the partial sums `[splits, B, L, N]` of the products of queries and items.

    With `squares` also those of the queries' squares, `[splits, B, L]`, and of the items', `[splits, L, N]`.
    """
    B, L, D = query.shape
    N = memory.shape[1]
    plan = plan_scores(B, L, N, D, target.warp_groups, squares)
    partial = query.new_empty(plan.splits, B, L, N, dtype=torch.float32)
    query_square = partial.new_empty(plan.splits, B, L) if squares else None
    item_square = partial.new_empty(plan.splits, L, N) if squares else None
    launch(
        memory_scores_kernel,
        (ceil_div(B, plan.block_b) * ceil_div(N, plan.block_n) * L, plan.splits),
        plan.num_warps,
        fenced_stages(plan.num_stages, target.warp_groups, target.precision, query, memory),
        query_ptr=query,
        memory_ptr=memory,
        mask_ptr=mask,
        partial_ptr=partial,
        query_square_ptr=query_square,
        item_square_ptr=item_square,
        B=B,
        L=L,
        N=N,
        D=D,
        chunk=plan.chunk,
        **_strides("q", query),
        **_memory_strides(memory),
        BLOCK_N=plan.block_n,
        BLOCK_B=plan.block_b,
        BLOCK_D=plan.block_d,
        PRECISION=target.precision,
    )
    return partial, query_square, item_square


def _cosine(partial: Tensor, query_square: Tensor | None, item_square: Tensor | None, results: list[Tensor]) -> Tensor:
    """Fill `results` with similarities and inverse norms, and return the similarities as one partial sum."""
    splits, B, L, N = partial.shape
    plan = plan_rows(N, features=1, kept=1)  # the row alone
    similarity, query_scale, item_scale = results
    launch(
        memory_cosine_kernel,
        (B * L,),
        plan.num_warps,
        1,
        partial_ptr=partial,
        query_square_ptr=query_square,
        item_square_ptr=item_square,
        similarity_ptr=similarity,
        query_scale_ptr=query_scale,
        item_scale_ptr=item_scale,
        rows=B * L,
        L=L,
        N=N,
        SPLITS=splits,
        BLOCK_N=plan.block_n,
        TILES=plan.tiles,
    )
    return similarity.view(1, B, L, N)


def empty_results(
    query: Tensor, memory: Tensor, topk: int, cosine: bool, save: bool, weights: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the results of `memory_forward`, uninitialized: output, what the backward needs, indices and weights."""
    B, L = query.shape[:2]
    N = memory.shape[1]
    saved: list[tuple[int, ...]] = [(B, L, N)] if save else []
    if cosine:
        saved += [(B, L, N), (B, L), (memory.shape[0], N)]
    kept = (B, L, min(topk, N))
    return (
        query.new_empty(query.shape),
        [query.new_empty(shape, dtype=torch.float32) for shape in saved],
        [query.new_empty(kept, dtype=dtype) for dtype in ((torch.int64, torch.float32) if weights else ())],
    )


def memory_forward(
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
    target: Target | None = None,
) -> list[Tensor]:
    """Return the output `[B, L, D]`, then all that was asked for.

    With `save` what the backward needs: the probabilities `[B, L, N]`, negative where the item was kept. With `cosine`
    the similarities `[B, L, N]`, one over the norms of the queries `[B, L]` and of the items `[L, N]`. With `weights`
    the indices and the weights `[B, L, min(k, N)]`.
    """
    out, saved, kept = empty_results(query, memory, topk, cosine, save, weights)
    results = [out, *saved, *kept]
    if not query.shape[0]:
        return results
    shared = memory.shape[0] == 1
    query, memory = _rows(query, shared), _rows(memory, False)
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    B, L, D = query.shape
    N = memory.shape[1]
    plan = plan_rows(N, D, min(topk, N))
    index, weight = kept or (None, None)
    with on_device(query):
        partial, query_square, item_square = _scores(query, memory, mask, target or target_of(query.device), cosine)
        if cosine:
            partial = _cosine(partial, query_square, item_square, saved[-3:])
        launch(
            memory_select_kernel,
            (B * L, ceil_div(D, plan.block_d * plan.blocks)),
            plan.num_warps,
            1,
            partial_ptr=partial,
            noise_ptr=None if noise is None else noise.contiguous(),
            memory_ptr=memory,
            mask_ptr=mask,
            out_ptr=out,
            p_ptr=saved[0] if save else None,
            index_ptr=index,
            weight_ptr=weight,
            rows=B * L,
            L=L,
            N=N,
            D=D,
            temperature=temperature,
            **_memory_strides(memory),
            SPLITS=partial.shape[0],
            TOPK=min(topk, N),
            EXCLUSIVE=exclusive,
            BLOCK_N=plan.block_n,
            TILES=plan.tiles,
            BLOCK_K=plan.block_k,
            BLOCK_D=plan.block_d,
            BLOCKS=plan.blocks,
        )
    return results


def _softmax_gradient(
    partial: Tensor, mask: Tensor | None, saved: list[Tensor], temperature: float
) -> tuple[Tensor, Tensor | None]:
    """Return ds and the dense w, `[2, B, L, N]`, from the partial sums of dw.

    For the cosine there is a third coefficient, and the projection `[B, L]` instead of None.
    """
    splits, B, L, N = partial.shape
    p, *cosine = saved
    coefficient = p.new_empty(3 if cosine else 2, B, L, N)
    similarity, query_scale, item_scale = cosine or (None, None, None)
    projection = p.new_empty(B, L) if cosine else None
    plan = plan_rows(N, features=1, kept=1)  # the row alone
    launch(
        memory_softmax_gradient_kernel,
        (B * L,),
        plan.num_warps,
        1,
        partial_ptr=partial,
        p_ptr=p,
        mask_ptr=mask,
        similarity_ptr=similarity,
        query_scale_ptr=query_scale,
        item_scale_ptr=item_scale,
        coefficient_ptr=coefficient,
        projection_ptr=projection,
        rows=B * L,
        L=L,
        N=N,
        temperature=temperature,
        SPLITS=splits,
        BLOCK_N=plan.block_n,
        TILES=plan.tiles,
    )
    return coefficient, projection


def empty_gradients(query: Tensor, memory: Tensor, need_query: bool, need_memory: bool) -> tuple[Tensor, Tensor]:
    """Return the results of `memory_backward`, uninitialized."""
    return query.new_empty(query.shape if need_query else (0,)), memory.new_empty(memory.shape if need_memory else (0,))


def memory_backward(
    grad_out: Tensor,
    query: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    saved: list[Tensor],
    temperature: float,
    need_query: bool,
    need_memory: bool,
    target: Target | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of query and memory; one that is not needed has no elements.

    `saved` is what `memory_forward` returned between output and indices.
    """
    grad_query, grad_memory = empty_gradients(query, memory, need_query, need_memory)
    if not query.shape[0]:
        return grad_query, grad_memory.zero_()
    shared = memory.shape[0] == 1
    grad_out, query, memory = _rows(grad_out, shared), _rows(query, shared), _rows(memory, False)
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    target = target or target_of(query.device)
    B, L, D = query.shape
    N = memory.shape[1]
    with on_device(query):
        partial, *_ = _scores(grad_out, memory, mask, target)
        coefficient, projection = _softmax_gradient(partial, mask, saved, temperature)
        common = {"mask_ptr": mask, "coefficient_ptr": coefficient, "B": B, "L": L, "N": N, "D": D}
        inputs = {"grad_out_ptr": grad_out, "query_ptr": query}
        strides = {**_strides("grad_out", grad_out), **_strides("q", query)}
        results = {"projection_ptr": projection, "grad_query_ptr": grad_query}, {"grad_memory_ptr": grad_memory}
        if need_query and need_memory and (plan := plan_joint_gradient(B)) is not None:
            launch(
                memory_joint_gradient_kernel,
                (ceil_div(D, plan.block_d), L),
                plan.num_warps,
                plan.num_stages,
                memory_ptr=memory,
                **inputs,
                **common,
                **results[0],
                **results[1],
                **strides,
                **_memory_strides(memory),
                **_constants(plan, target),
            )
            return grad_query, grad_memory
        if need_query:
            plan = plan_query_gradient(B, target.warp_groups)
            launch(
                memory_query_gradient_kernel,
                (ceil_div(B, plan.block_b) * ceil_div(D, plan.block_d), L),
                plan.num_warps,
                fenced_stages(plan.num_stages, target.warp_groups, target.precision, query, memory),
                query_ptr=None if projection is None else query,
                memory_ptr=memory,
                **common,
                **results[0],
                **_strides("q", query),
                **_memory_strides(memory),
                **_constants(plan, target),
            )
        if need_memory:
            plan = plan_items_gradient(B, target.warp_groups)
            launch(
                memory_items_gradient_kernel,
                (ceil_div(N, plan.block_n) * ceil_div(D, plan.block_d), L),
                plan.num_warps,
                fenced_stages(plan.num_stages, target.warp_groups, target.precision, query, memory),
                memory_ptr=None if projection is None else memory,
                **inputs,
                **common,
                **results[1],
                **strides,
                **_memory_strides(memory),
                **_constants(plan, target),
            )
    return grad_query, grad_memory

"""The space-aware memory op: contract, checks and choice of backend."""

from typing import Literal, overload

import torch
from torch import Tensor

from simsid.kernels.backend import choose_backend
from simsid.kernels.checks import check_choice, check_integer, check_positive, check_tensor
from simsid.kernels.handles import Handles
from simsid.kernels.memory.joint_gradient import space_aware_memory_torch
from simsid.kernels.memory.plan import refuse
from simsid.kernels.ranges import named_range

THRESHOLDS = ("inclusive", "exclusive")
SIMILARITIES = ("dot", "cosine")


_handles = Handles()


@overload
def space_aware_memory(
    query: Tensor,
    memory: Tensor,
    topk: int = ...,
    *,
    threshold: str = ...,
    noise: Tensor | None = ...,
    temperature: float = ...,
    similarity: str = ...,
    item_mask: Tensor | None = ...,
    return_weights: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def space_aware_memory(
    query: Tensor,
    memory: Tensor,
    topk: int = ...,
    *,
    threshold: str = ...,
    noise: Tensor | None = ...,
    temperature: float = ...,
    similarity: str = ...,
    item_mask: Tensor | None = ...,
    return_weights: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...


@named_range
def space_aware_memory(
    query: Tensor,
    memory: Tensor,
    topk: int = 5,
    *,
    threshold: str = "inclusive",
    noise: Tensor | None = None,
    temperature: float = 1.0,
    similarity: str = "dot",
    item_mask: Tensor | None = None,
    return_weights: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Replace each query by the few items of its own location that it resembles most.

        s[b,l,n]   = (sum_d query[b,l,d] memory[l,n,d] + noise[b,l,n]) / temperature
        p          = softmax_n(s)
        w          = top-k of p, the rest zero, divided by its sum
        out[b,l,:] = sum_n w[b,l,n] memory[l,n,:]

    The sum over d is the dot product of query and item; `similarity="cosine"` divides it by both norms.

    Source: SimSID (arXiv 2403.08689), section 3.2, space-aware memory and Gumbel shrinkage; SQUID (arXiv 2111.13495),
    section 3.3. With the cosine, a memory shared by all locations and no shrinkage this is the look-up of MemAE (arXiv
    1904.02639), equations 3 to 5.

    Differences: the papers' shrinkage keeps the k most probable items; the released code keeps only those strictly
    above the k-th, `k - 1` of them (`threshold="exclusive"`).

    The gradient is straight-through: the gradient of `w` is applied to `p`, so that items outside the top-k learn too.
    Nothing is differentiated through the selection, the division or the noise.

    Precision: scores, probabilities and sums are float32 also under autocast. The kernels multiply two float32
    numbers by three TF32 products, which select as float32 does, or by one where PyTorch is allowed TF32
    (`torch.set_float32_matmul_precision("high")`); they multiply a bfloat16 query and a float32 memory, as a pair of
    bfloat16 numbers, to 2^-16. With the kernels the output for a query is the same, bit for bit, in every run and
    every batch. An item that is not finite can make every query of its location NaN; mask it.

    Args:
        query: `[B, L, D]`, float16 to float64.
        memory: `[L, N, D]`, one set of items a location, or `[1, N, D]`, shared by all; on the query's device.
        topk: items kept, an integer of at least 1; `topk >= N` keeps all (`"inclusive"`). Ties at rank k go to the
            lowest index.
        threshold: `"inclusive"` keeps the k largest; `"exclusive"` keeps those strictly above the `min(k, N)`-th
            largest and drops every item tied there; where none is kept the output is 0.
        noise: `[B, L, N]` added to the similarity (Gumbel noise makes the selection a sample), or None.
        temperature: divides the similarity, a number greater than 0.
        similarity: `"dot"` or `"cosine"`. The gradient of the cosine goes through both norms. A query or item whose
            norm is at most 1e-12 has similarity 0 and gets no gradient from it; norms above 1e19 overflow float32.
        item_mask: bool `[L, N]` (`[1, N]` for shared items), False for items that no query may select, or None. The
            result is that of a memory of the other items alone: a masked item has probability 0 and gradient 0, and
            may hold anything, NaN included. A location without any valid item gives 0, and its query gradient 0.
        return_weights: also return which items were kept and their weights.
        backend: `"auto"` (fused kernels on CUDA where they exist, PyTorch elsewhere), `"triton"` or `"torch"`. The
            kernels have no second derivative, no forward mode and no `torch.func` transforms; inside the last two,
            `"auto"` takes PyTorch.

    Returns:
        `[B, L, D]` in the query's dtype. Similarities and probabilities are computed in float32 (float64 for float64).
        With `return_weights`, a tuple of that, the indices `[B, L, min(k, N)]` (int64, largest similarity first) and
        the weights `w` of those items (float32; float64 for float64), 0 for an item that `"exclusive"` dropped. Where
        fewer than k items are valid, masked ones with weight 0 fill the last places. Neither indices nor weights have a
        gradient.

    Raises:
        TypeError: a dtype or type that is not listed above.
        ValueError: a shape, device, `topk`, `threshold`, `temperature`, `similarity` or `backend` outside these ranges.
        RuntimeError: `backend="triton"` where the kernels cannot run, with the reason.
    """
    tensors = (query, memory, item_mask, noise)
    signature = handle = None
    if not return_weights and not torch.compiler.is_compiling():
        precision = torch.backends.cuda.matmul.fp32_precision
        signature, handle = _handles.find(tensors, (topk, threshold, temperature, similarity, backend, precision))
    if handle is not None:
        return handle.launch(tensors)
    check_tensor("query", query, ("B", "L", "D"))
    _, locations, features = query.shape
    check_tensor("memory", memory, ("L or 1", "N", features), like=("the query", query))
    if memory.shape[0] not in (1, locations):
        raise ValueError(f"memory must hold the items of {locations} locations, or 1 shared set, got {memory.shape[0]}")
    if 0 in (*memory.shape, *query.shape[1:]):
        raise ValueError(
            f"query and memory must not be empty, got {list(query.shape)} and {list(memory.shape)}; only B may be 0"
        )
    topk = check_integer("topk", topk, least=1)
    check_choice("threshold", threshold, THRESHOLDS)
    if noise is not None:
        check_tensor("noise", noise, (query.shape[0], locations, memory.shape[1]), like=("the query", query))
    check_positive("temperature", temperature)
    check_choice("similarity", similarity, SIMILARITIES)
    if item_mask is not None:
        check_tensor("item_mask", item_mask, tuple(memory.shape[:2]), like=("the query", query), boolean=True)
    refusal = refuse(query.dtype, memory.dtype, locations, memory.shape[1], topk)
    options = (topk, threshold, noise, float(temperature), similarity, item_mask)
    if choose_backend(backend, query.device, refusal).backend == "triton":
        from simsid.kernels.memory.fused import passes, space_aware_memory_fused

        if signature is not None:
            chosen = (topk, threshold == "exclusive", similarity == "cosine", float(temperature))
            _handles.keep(signature, tensors, passes(query, memory, *chosen))
        return space_aware_memory_fused(query, memory, *options, return_weights)
    out, w, index = space_aware_memory_torch(query, memory, *options)
    return (out, index, w.gather(-1, index)) if return_weights else out

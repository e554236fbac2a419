"""Inputs of the space-aware memory, and the comparison of its kernels with the reference in float64."""

import functools
import math

import torch
from harness import DEVICE, assert_as_close_as_torch, terms

from simsid.kernels import space_aware_memory
from simsid.kernels.memory.reference import normalize, shrink, space_aware_memory_reference

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(FLOAT32, FLOAT32), (BFLOAT16, FLOAT32), (FLOAT16, FLOAT32), (BFLOAT16, BFLOAT16), (FLOAT16, FLOAT16)]


def draw(B, L, N, D, query=FLOAT32, memory=FLOAT32, shared=False, noisy=False, seed=0):
    """Return query, memory, cotangent and noise; scores are of order 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    z, M, g = normal(B, L, D), normal(1 if shared else L, N, D) / math.sqrt(D), normal(B, L, D)
    noise = normal(B, L, N).to(DEVICE) if noisy else None
    return z.to(query).to(DEVICE), M.to(memory).to(DEVICE), g.to(query).to(DEVICE), noise


def draw_mask(M, seed):
    """Return a mask of items that leaves about half of them and at least one in each location."""
    mask = torch.rand(M.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[:, seed % M.shape[1]] = True
    return mask.to(DEVICE)


def gap(z, M, k, noise, temperature, exclusive, similarity="dot", item_mask=None):
    """Return the smallest distance between the last score that is kept and the first that is not."""
    z, M = z.double(), M.double().expand(z.shape[1], -1, -1)
    if similarity == "cosine":
        z, M = normalize(z), normalize(M)
    s = torch.einsum("bld,lnd->bln", z, M)
    s = (s if noise is None else s + noise) / temperature
    valid = torch.full(s.shape[1:2], s.shape[2], device=s.device)
    if item_mask is not None:
        s, valid = s.masked_fill(~item_mask, -math.inf), item_mask.sum(-1).expand(s.shape[1])
    s = torch.sort(s, descending=True).values
    gaps = [math.inf]
    for location, count in enumerate(valid.tolist()):
        last = min(k, count) - (1 if exclusive else 0)
        if 0 < last < count:
            gaps.append((s[:, location, last - 1] - s[:, location, last]).min().item())
    return min(gaps)


def gradients(function, z, M, g):
    z, M = z.detach().requires_grad_(), M.detach().requires_grad_()
    out = function(z, M)
    out.backward(g)
    return {"out": out, "dz": z.grad, "dM": M.grad}


def gradients_apart(z, M, g, k, **options):
    """Return the fused gradients that are computed where only one input needs one, by kernels of their own."""

    def gradient(leaf, call):
        leaf = leaf.detach().requires_grad_()
        return torch.autograd.grad(call(leaf), leaf, g)[0]

    fused = functools.partial(space_aware_memory, topk=k, backend="triton", **options)
    return {
        "dz": gradient(z, lambda leaf: fused(leaf, M.detach())),
        "dM": gradient(M, lambda leaf: fused(z.detach(), leaf)),
    }


def kernel_names(launches):
    return [launched.kernel.fn.__name__.removeprefix("memory_").removesuffix("_kernel") for launched in launches]


def roundings_of(query):
    """Return the float32 roundings a product may be off by; float32 for a bf16 query is a pair of bf16, to 2^-18."""
    return 64.0 if query == BFLOAT16 else 3.0


def sizes(z, M, g, k, noise, threshold, temperature, similarity, item_mask):
    """Return, by name, the largest result there would be without cancellation, and the largest |z M / temperature|."""
    z, M, g = z.detach().double(), M.detach().double().expand(z.shape[1], -1, -1), g.double()
    norms = 1.0
    if item_mask is not None:
        M = torch.where(item_mask[..., None], M, 0.0)
    if similarity == "cosine":
        norms = z.norm(dim=-1)[..., None].clamp_min(1e-6) * M.norm(dim=-1).clamp_min(1e-6)
    s = torch.einsum("bld,lnd->bln", z, M) / norms
    logits = (s if noise is None else s + noise) / temperature
    if item_mask is not None:
        logits = logits.masked_fill(~item_mask, -1e30)
    p = torch.softmax(logits, dim=-1)
    w = shrink(logits, p, k, threshold, item_mask)[0]
    # The cosine's gradient is a difference of two terms of this size.
    ds = terms(p, torch.einsum("bld,lnd->bln", g, M)) / temperature / norms * (2 if similarity == "cosine" else 1)
    results = {
        "out": torch.einsum("bln,lnd->bld", w, M.abs()),
        "dz": torch.einsum("bln,lnd->bld", ds, M.abs()),
        "dM": torch.einsum("bln,bld->lnd", w, g.abs()) + torch.einsum("bln,bld->lnd", ds, z.abs()),
    }
    return {name: value.amax().item() for name, value in results.items()}, s.abs().amax().item() / temperature


def compare(z, M, g, k, noise=None, threshold="inclusive", temperature=1.0, similarity="dot", item_mask=None):
    """Compare fused output and gradients with the reference in float64; the reference in their dtype is the measure."""
    options = {
        "threshold": threshold,
        "noise": noise,
        "temperature": temperature,
        "similarity": similarity,
        "item_mask": item_mask,
    }

    def reference(z, M):
        return space_aware_memory_reference(z, M, k, **options)[0]

    def fused(z, M):
        return space_aware_memory(z, M, k, backend="triton", **options)

    exact = gradients(reference, z.double(), M.double(), g.double())
    same, got = gradients(reference, z, M, g), gradients(fused, z, M, g)
    scale, score = sizes(z, M, g, k, **options)
    # Two products, and the one that makes the scores, whose error is an error of the exponent.
    slack = roundings_of(z.dtype) * (2.0 + score)
    for name in exact:
        assert_as_close_as_torch(name, got[name], same[name], exact[name], slack, scale[name])
    return got

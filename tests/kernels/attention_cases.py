"""Inputs of neighbor attention, and its comparison with the reference in float64; needs no package of the tests."""

import torch
from harness import DEVICE, assert_as_close_as_torch, terms

from simsid.kernels import neighbor_attention
from simsid.kernels.attention.plan import Window
from simsid.kernels.attention.reference import NEIGHBORS, neighbor_index

NAMES = ("query", "key", "value", "pad_key", "pad_value")


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def inputs(batch, grid, features, *, pads=True, dtype=torch.float32, pad_dtype=None):
    shape = (batch, grid[0] * grid[1], features)
    tensors = {name: draw(*shape, dtype=dtype, seed=seed) for seed, name in enumerate(NAMES[:3])}
    if pads:
        tensors |= {name: draw(features, dtype=pad_dtype or dtype, seed=seed) for seed, name in enumerate(NAMES[3:], 3)}
    return tensors


def run(tensors, grid, heads, cotangent=None, backend="triton", **options):
    """Return the output and, for a cotangent, the gradient to every input, by name."""
    leaves = {name: tensor.detach().requires_grad_(cotangent is not None) for name, tensor in tensors.items()}
    out = neighbor_attention(grid=grid, heads=heads, backend=backend, **leaves, **options)
    if cotangent is None:
        return {"out": out}
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent.to(out.dtype))
    return {"out": out, **dict(zip(leaves, gradients))}


def window_of(kernel_size=3, dilation=1, include_center=False):
    pairs = [x if isinstance(x, tuple) else (x, x) for x in (kernel_size, dilation)]
    return Window(*pairs[0], *pairs[1], include_center)


def sizes(tensors, grid, heads, cotangent, window=NEIGHBORS, key_mask=None):
    """Return, by name, the largest results there would be without cancellation, and the largest score."""
    index = neighbor_index(grid, DEVICE, window)
    leaves = {name: tensor.double().abs().requires_grad_() for name, tensor in tensors.items()}

    def windows(tensors, name):
        x = tensors[name]
        pad = tensors.get(f"pad_{name}", torch.zeros_like(x[0, 0]))
        return torch.cat([x, pad.to(x.dtype).expand(len(x), 1, -1)], dim=1)[:, index].unflatten(-1, (heads, -1))

    def products(x, windows):
        return torch.einsum("blhd,blwhd->blhw", x.unflatten(-1, (heads, -1)), windows)

    plain = {name: tensor.double() for name, tensor in tensors.items()}
    scale = (plain["query"].shape[-1] // heads) ** -0.5
    keys = (
        torch.ones(len(plain["query"]), len(index), dtype=torch.bool, device=DEVICE) if key_mask is None else key_mask
    )
    takes_part = torch.cat([keys, keys.new_full((len(keys), 1), "pad_key" in plain)], dim=1)
    inside = takes_part[:, index][:, :, None]
    logits = scale * products(plain["query"], windows(plain, "key"))
    # A location without neighbors has no probabilities.
    p = torch.softmax(logits.masked_fill(~inside, -torch.inf), dim=-1).nan_to_num(0.0)
    ds = scale * terms(p, products(cotangent.double(), windows(plain, "value")))
    scores = ds * products(leaves["query"], windows(leaves, "key"))
    values = p * products(cotangent.double().abs(), windows(leaves, "value"))
    results = dict(zip(leaves, torch.autograd.grad(scores.sum() + values.sum(), list(leaves.values()))))
    results["out"] = torch.einsum("blhw,blwhd->blhd", p, windows(leaves, "value"))
    return {name: value.amax().item() for name, value in results.items()}, (logits * inside).abs().amax().item()


def assert_fused_is_right(tensors, grid, heads, key_mask=None, **options):
    cotangent = draw(*tensors["query"].shape, dtype=tensors["query"].dtype, seed=9)
    doubles = {name: x.double() for name, x in tensors.items()}
    fused, same, exact = (
        run(inputs, grid, heads, cotangent, backend=backend, key_mask=key_mask, **options)
        for inputs, backend in ((tensors, "triton"), (tensors, "torch"), (doubles, "torch"))
    )
    scale, score = sizes(tensors, grid, heads, cotangent, window_of(**options), key_mask)
    # Two products, and the one that makes the scores, whose error is an error of the exponent.
    slack = 1.5 * (2.0 + score)
    for name in fused:
        assert_as_close_as_torch(name, fused[name], same[name], exact[name], slack, scale[name])

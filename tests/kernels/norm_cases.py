"""Inputs of residual + LayerNorm + ReLU, and its comparison with the reference in float64; no package of the tests."""

import torch
from harness import DEVICE, assert_as_close_as_torch

from simsid.kernels import residual_layer_norm

NAMES = ("x", "residual", "weight", "bias")


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def inputs(shape, dtype=torch.float32, residual_dtype=None, weight_dtype=torch.float32):
    dtypes = (dtype, residual_dtype or dtype, weight_dtype, weight_dtype)
    shapes = (shape, shape, shape[-1:], shape[-1:])
    return {
        name: draw(*shape, dtype=dtype, seed=seed)
        for seed, (name, shape, dtype) in enumerate(zip(NAMES, shapes, dtypes))
    }


def run(tensors, cotangent=None, backend="triton"):
    """Return the output and, for a cotangent, the gradient to every input, by name."""
    leaves = {name: tensor.detach().requires_grad_(cotangent is not None) for name, tensor in tensors.items()}
    out = residual_layer_norm(**leaves, backend=backend)
    if cotangent is None:
        return {"out": out}
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent.to(out.dtype))
    return {"out": out, **dict(zip(leaves, gradients))}


def assert_fused_is_right(tensors, scale=4.0):
    cotangent = draw(*tensors["x"].shape, dtype=tensors["x"].dtype, seed=9)
    got, same = run(tensors, cotangent), run(tensors, cotangent, backend="torch")
    exact = run({name: x.double() for name, x in tensors.items()}, cotangent, backend="torch")
    sign_is_sure = exact["out"].sub(same["out"].double()).abs() < 0.5 * exact["out"] + (exact["out"] == same["out"])
    assert sign_is_sure.float().mean() > 0.99, "too many outputs are close to 0, where ReLU has no derivative"
    for name in got:  # a gradient of x may be a small difference of numbers as large as the scale
        assert_as_close_as_torch(name, got[name], same[name], exact[name], slack=8.0, scale=scale)

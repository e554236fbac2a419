"""Transforms of all ops: torch.func, forward mode and second derivatives, in PyTorch and as errors of the kernels."""

import pytest
import torch
from harness import DEVICE, needs_kernels
from torch.autograd import forward_ad

from simsid.kernels import neighbor_attention, residual_layer_norm, space_aware_memory

BATCH, LOCATIONS, FEATURES = 2, 4, 6


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


ITEMS, (WEIGHT, BIAS) = normal(LOCATIONS, 5, FEATURES, seed=1), normal(2, FEATURES, seed=2)


def memory(x, backend):
    return space_aware_memory(x, ITEMS.to(x.dtype), 2, backend=backend)


def memory_of_cosines(x, backend):
    mask = torch.tensor([[True, False, True, True, True]], device=DEVICE).expand(LOCATIONS, 5)
    return space_aware_memory(x, ITEMS.to(x.dtype), 2, similarity="cosine", item_mask=mask, backend=backend)


def attention(x, backend):
    return neighbor_attention(x, 2 * x, 3 * x, (2, 2), 2, backend=backend)


def layer_norm(x, backend):
    return residual_layer_norm(x, 2 * x, WEIGHT.to(x.dtype), BIAS.to(x.dtype), backend=backend)


every_op = pytest.mark.parametrize("op", [memory, memory_of_cosines, attention, layer_norm])


@every_op
def test_reverse_and_forward_mode_agree_on_the_reference(op):
    x, tangent, cotangent = (normal(BATCH, LOCATIONS, FEATURES, seed=seed) for seed in (3, 4, 5))
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(op(leaf, "torch"), leaf, cotangent)

    def call(x):
        return op(x, "torch")

    torch.testing.assert_close(torch.func.vjp(call, x)[1](cotangent)[0], want)
    torch.testing.assert_close((torch.func.jvp(call, (x,), (tangent,))[1] * cotangent).sum(), (want * tangent).sum())
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(call(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close((dual * cotangent).sum(), (want * tangent).sum())


@every_op
def test_second_derivatives_agree_on_the_reference(op):
    x, tangent = normal(1, LOCATIONS, FEATURES, seed=3), normal(1, LOCATIONS, FEATURES, seed=4)

    def loss(x):
        return op(x, "torch").square().sum()

    want = torch.autograd.functional.vhp(loss, x, tangent)[1]
    torch.testing.assert_close(torch.func.jvp(torch.func.grad(loss), (x,), (tangent,))[1], want)


@every_op
def test_vmap_of_the_reference_equals_its_calls(op):
    x = normal(3, BATCH, LOCATIONS, FEATURES)
    torch.testing.assert_close(torch.vmap(lambda x: op(x, "auto"))(x), torch.stack([op(each, "auto") for each in x]))


@every_op
def test_compiled_gradient_of_the_reference_is_one_graph(op):
    torch._dynamo.reset()
    x = normal(BATCH, LOCATIONS, FEATURES)
    gradient = torch.func.grad(lambda x: op(x, "torch").square().sum())
    torch.testing.assert_close(torch.compile(gradient, fullgraph=True, backend="aot_eager")(x), gradient(x))


@needs_kernels
@every_op
@pytest.mark.parametrize(
    "transform",
    [
        torch.vmap,
        lambda call: torch.func.grad(lambda x: call(x).sum()),
        lambda call: lambda x: torch.func.jvp(call, (x,), (x,)),
    ],
    ids=["vmap", "grad", "jvp"],
)
def test_kernels_inside_torch_func_raise_one_sentence(op, transform):
    x = normal(BATCH, LOCATIONS, FEATURES).float()[None]
    with pytest.raises(RuntimeError, match=r'backend="triton" cannot run here: .* torch\.func transforms'):
        transform(lambda x: op(x.view(BATCH, LOCATIONS, FEATURES), "triton"))(x)


@needs_kernels
@every_op
def test_kernels_in_forward_mode_raise_one_sentence(op):
    x = normal(BATCH, LOCATIONS, FEATURES).float()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="do not support forward-mode differentiation"):
        op(forward_ad.make_dual(x, x), "triton")


@needs_kernels
@every_op
@pytest.mark.parametrize("constant_cotangent", [True, False], ids=["linear loss", "square loss"])
def test_second_derivative_of_the_kernels_raises_one_sentence(op, constant_cotangent):
    x = normal(BATCH, LOCATIONS, FEATURES).float().requires_grad_()
    out = op(x, "triton")
    loss = out.sum() if constant_cotangent else out.square().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative in Triton; use backend="torch"'):
        gradient.square().sum().backward()

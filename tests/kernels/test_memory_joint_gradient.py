"""The joint gradient of the space-aware memory on a CPU, beside the gradient of the reference."""

import pytest
import torch
from test_memory import draw, run

from simsid.kernels import space_aware_memory
from simsid.kernels.memory.reference import space_aware_memory_reference


@pytest.mark.parametrize("threshold", ["inclusive", "exclusive"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_joint_gradient_equals_that_of_the_reference(threshold, shared, dtype, tolerance):
    z, M, g = draw(B=5, L=3, N=11, D=16, seed=8, dtype=dtype, shared=shared)
    noise = torch.randn(5, 3, 11, dtype=dtype)
    out, dz, dM = run(z, M, g, 2, threshold=threshold, noise=noise, temperature=3.0)
    leaves = z.clone().requires_grad_(), M.clone().requires_grad_()
    want = space_aware_memory_reference(*leaves, 2, threshold, noise, 3.0)[0]
    assert out.equal(want.detach())
    for got, gradient in zip((dz, dM), torch.autograd.grad(want, leaves, g)):
        torch.testing.assert_close(got, gradient, rtol=tolerance, atol=tolerance)


def test_gradient_of_the_items_is_made_by_one_product(monkeypatch):
    calls, bmm = [], torch.bmm

    def counted(left, right):
        calls.append((left.shape, right.shape))
        return bmm(left, right)

    z, M, g = draw(B=3, L=4, N=7, D=5)
    monkeypatch.setattr(torch, "bmm", counted)
    dM = run(z, M, g, 2)[2]
    assert (torch.Size([4, 7, 6]), torch.Size([4, 6, 5])) in calls
    assert dM.is_contiguous()


def test_one_of_both_gradients_equals_that_of_both():
    z, M, g = draw()
    _, dz, dM = run(z, M, g, 2)
    for position, want in enumerate((dz, dM)):
        inputs = [z.clone(), M.clone()]
        leaf = inputs[position].requires_grad_()
        assert torch.autograd.grad(space_aware_memory(*inputs, 2, backend="torch"), leaf, g)[0].equal(want)


def test_second_derivative_of_both_inputs_equals_that_of_the_reference():
    z, M, g = draw(seed=3)

    def second(function):
        leaves = z.clone().requires_grad_(), M.clone().requires_grad_()
        first = torch.autograd.grad(function(*leaves), leaves, g, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)

    got = second(lambda z, M: space_aware_memory(z, M, 2, backend="torch"))
    want = second(lambda z, M: space_aware_memory_reference(z, M, 2, "inclusive", None, 1.0)[0])
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other)


def test_gradient_under_autocast_is_that_without():
    z, M, g = draw(dtype=torch.float32)
    want = run(z, M, g, 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(z, M, g, 2)
    assert all(one.equal(other) for one, other in zip(got, want))

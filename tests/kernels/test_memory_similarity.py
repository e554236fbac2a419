"""The fused space-aware memory with the cosine similarity and with masked items."""

import math

import pytest
import torch
from harness import DEVICE, needs_kernels
from memory_cases import PAIRS, compare, draw, draw_mask, gradients, gradients_apart, kernel_names, roundings_of

from simsid.kernels import space_aware_memory
from simsid.kernels.launch import record_launches

pytestmark = [needs_kernels, pytest.mark.usefixtures("poisoned")]


@pytest.mark.parametrize("dtypes", PAIRS[:2], ids=["float32", "bfloat16"])
def test_every_gradient_kernel_agrees_for_the_cosine_and_masked_items(dtypes):
    z, M, g, _ = draw(3, 1, 20, 40, *dtypes)
    mask = draw_mask(M, 0)
    M = torch.where(mask[..., None], M, math.nan)
    want = compare(z, M, g, 3, similarity="cosine", item_mask=mask)
    assert (want["dM"][~mask] == 0).all()
    for name, value in gradients_apart(z, M, g, 3, similarity="cosine", item_mask=mask).items():
        rounding = 2 * torch.finfo(value.dtype).eps + 4 * roundings_of(z.dtype) * 2.0**-24
        assert (value - want[name]).abs().max() <= rounding * want[name].abs().max()


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("threshold", ["inclusive", "exclusive"])
@pytest.mark.parametrize("shared", [False, True], ids=["own items", "shared items"])
def test_masked_items_give_what_the_other_items_alone_give(shared, threshold, similarity):
    z, M, g, noise = draw(2, 2, 20, 24, shared=shared, noisy=True)
    valid = torch.tensor([1, 4, 5, 11, 18], device=DEVICE)
    mask = torch.zeros(M.shape[:2], dtype=torch.bool, device=DEVICE)
    mask[:, valid] = True
    for k in (1, 7):
        options = {"threshold": threshold, "similarity": similarity}
        want = gradients(
            lambda z, M, k=k, options=options: space_aware_memory(z, M, k, noise=noise[..., valid], **options),
            z,
            M[:, valid],
            g,
        )
        got = compare(z, torch.where(mask[..., None], M, math.inf), g, k, noise, **options, item_mask=mask)
        for name in ("out", "dz"):
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got["dM"][:, valid], want["dM"], rtol=1e-5, atol=1e-6)
        assert (got["dM"][~mask] == 0).all()


@pytest.mark.parametrize("needs", ["zM", "z", "M"])
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_location_without_valid_items_gives_zero(bad, needs):
    z, M, g, _ = draw(2, 2, 9, 20)
    mask = torch.tensor([[True], [False]], device=DEVICE).expand(2, 9)
    z[1, 1, 3] = M[1, 2] = g[0, 1, 4] = bad
    z, M = z.requires_grad_("z" in needs), M.requires_grad_("M" in needs)
    out, index, weight = space_aware_memory(z, M, 3, item_mask=mask, return_weights=True, backend="triton")
    out.backward(g)
    assert (out[:, 1] == 0).all() and (weight[:, 1] == 0).all() and (out[:, 0] != 0).all()
    assert index[:, 1].equal(torch.arange(3, device=DEVICE).expand(2, 3))
    assert z.grad is None or ((z.grad[:, 1] == 0).all() and z.grad.isfinite().all())
    assert M.grad is None or ((M.grad[1] == 0).all() and M.grad.isfinite().all())


def test_cosine_of_rows_of_zeros_is_zero_and_has_no_gradient():
    z, M, g, _ = draw(3, 2, 9, 20)
    z[0, 1] = M[1, 2] = 0
    got = compare(z, M, g, 9, similarity="cosine")
    torch.testing.assert_close(got["out"][0, 1], M[1].mean(0))
    assert (got["dz"][0, 1] == 0).all()


def test_cosine_does_not_depend_on_the_scale_of_rows():
    z, M, _, _ = draw(3, 2, 9, 20)
    want = space_aware_memory(z, M, 3, similarity="cosine", return_weights=True, backend="triton")[1:]
    got = space_aware_memory(2**20 * z, 2**-20 * M, 3, similarity="cosine", return_weights=True, backend="triton")[1:]
    assert got[0].equal(want[0]) and got[1].equal(want[1])


def test_cosine_launches_one_kernel_more():
    z, M, g, _ = draw(2, 1, 4, 8)
    with record_launches() as launches:
        space_aware_memory(z.requires_grad_(), M, 2, similarity="cosine", backend="triton").backward(g)
    assert kernel_names(launches) == ["scores", "cosine", "select", "scores", "softmax_gradient", "query_gradient"]

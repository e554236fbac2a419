"""The space-aware memory op: its contract, and its PyTorch reference against a loop over queries and items."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simsid.kernels import space_aware_memory
from simsid.kernels.memory.reference import shrink


def by_hand(z, M, k, threshold="inclusive", noise=None, temperature=1.0, g=None, similarity="dot"):
    """Compute the definition one query at a time in float64: out, and with g = dLoss/dout also dz and dM."""
    z, M, g = z.double(), M.double().expand(z.shape[1], -1, -1), None if g is None else g.double()
    out, dz, dM = torch.zeros_like(z), torch.zeros_like(z), torch.zeros_like(M)
    for b in range(z.shape[0]):
        for location in range(z.shape[1]):
            items, N, query = M[location], M.shape[1], z[b, location]
            cosine = similarity == "cosine"
            norms = [float(query.norm() * items[n].norm()) if cosine else 1.0 for n in range(N)]
            c = [float(items[n] @ query) / norms[n] for n in range(N)]
            s = [c[n] + (0.0 if noise is None else float(noise[b, location, n])) for n in range(N)]
            e = [math.exp((x - max(s)) / temperature) for x in s]
            p = [x / sum(e) for x in e]
            order = sorted(range(N), key=lambda n: (-s[n], n))
            kept = order[:k]
            if threshold == "exclusive":
                kept = [n for n in range(N) if s[n] > s[order[min(k, N) - 1]]]
            total = sum(p[n] for n in kept)
            w = [p[n] / total if n in kept else 0.0 for n in range(N)]
            out[b, location] = sum(w[n] * items[n] for n in range(N))
            if g is not None:
                dw = [float(g[b, location] @ items[n]) for n in range(N)]
                mean = sum(p[n] * dw[n] for n in range(N))
                for n in range(N):
                    ds = p[n] * (dw[n] - mean) / temperature
                    dz[b, location] += ds * items[n] / norms[n]
                    dM[location, n] += w[n] * g[b, location] + ds * query / norms[n]
                    if cosine:
                        dz[b, location] -= ds * c[n] * query / query.square().sum()
                        dM[location, n] -= ds * c[n] * items[n] / items[n].square().sum()
    return out, dz, dM


def draw(B=3, L=4, N=7, D=5, seed=0, dtype=torch.float64, shared=False):
    """Return a query, a memory and a cotangent with normal entries."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, L, D), (1 if shared else L, N, D), (B, L, D)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(z, M, g, k, **options):
    z, M = z.clone().requires_grad_(), M.clone().requires_grad_()
    out = space_aware_memory(z, M, k, backend="torch", **options)
    out.backward(g)
    return out.detach(), z.grad, M.grad


def assert_like_by_hand(z, M, g, k, **options):
    got, want = run(z, M, g, k, **options), by_hand(z, M, k, g=g, **options)
    for name, a, b in zip(("out", "dz", "dM"), got, want):
        b = b.sum(0, keepdim=True) if name == "dM" and M.shape[0] == 1 else b
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 3),
    L=st.integers(1, 3),
    N=st.integers(1, 6),
    D=st.integers(1, 5),
    k=st.integers(1, 7),
    threshold=st.sampled_from(["inclusive", "exclusive"]),
    noisy=st.booleans(),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    shared=st.booleans(),
    similarity=st.sampled_from(["dot", "cosine"]),
    seed=st.integers(0, 1000),
)
def test_reference_equals_the_loop(B, L, N, D, k, threshold, noisy, temperature, shared, similarity, seed):
    z, M, g = draw(B, L, N, D, seed, shared=shared)
    noise = torch.randn(B, L, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) if noisy else None
    options = {"threshold": threshold, "noise": noise, "temperature": temperature, "similarity": similarity}
    assert_like_by_hand(z, M, g, k, **options)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("threshold", ["inclusive", "exclusive"])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_masked_items_give_what_the_other_items_alone_give(k, threshold, similarity):
    z, M, g = draw()
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [1] * 7, [0, 0, 0, 1, 0, 0, 0], [1, 0, 1, 0, 1, 0, 1]]).bool()
    bad = torch.where(mask[..., None], M, torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.0]))
    options = {"threshold": threshold, "similarity": similarity}
    out, dz, dM = run(z, bad, g, k, item_mask=mask, **options)
    for location, valid in enumerate(mask):
        part = slice(location, location + 1)
        want = run(z[:, part], M[part, valid], g[:, part], k, **options)
        torch.testing.assert_close((out[:, part], dz[:, part], dM[part, valid]), want)
    assert (dM[~mask] == 0).all()


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_location_without_valid_items_gives_zero(bad):
    z, M, g = draw()
    mask = torch.ones(4, 7, dtype=torch.bool)
    mask[1], mask[2, 3:] = False, False
    z[1, 1, 3] = M[1, 2] = g[0, 1, 4] = bad
    z, M = z.requires_grad_(), M.requires_grad_()
    out, index, weight = space_aware_memory(z, M, 5, item_mask=mask, return_weights=True)
    out.backward(g)
    assert all((value == 0).all() for value in (out[:, 1], weight[:, 1], z.grad[:, 1], M.grad[1]))
    assert z.grad.isfinite().all() and M.grad.isfinite().all() and (out[:, [0, 2, 3]] != 0).all()
    assert index[:, 1].equal(torch.arange(5).expand(3, 5))
    assert index[:, 2, 3:].equal(torch.tensor([3, 4]).expand(3, 2)) and (weight[:, 2, 3:] == 0).all()


def test_valid_item_of_score_minus_infinity_comes_before_masked_items():
    z, M = torch.ones(1, 1, 1), torch.tensor([[[5.0], [-math.inf], [1.0]]])
    mask = torch.tensor([[False, True, True]])
    _, index, weight = space_aware_memory(z, M, 3, item_mask=mask, return_weights=True)
    assert index.tolist() == [[[2, 1, 0]]] and weight.tolist() == [[[1.0, 0.0, 0.0]]]


def test_cosine_of_rows_of_zeros_is_zero_and_has_no_gradient():
    z, M, g = draw()
    z[0, 1] = M[1, 2] = 0
    out, dz, dM = run(z, M, g, 7, similarity="cosine")
    torch.testing.assert_close(out[0, 1], M[1].mean(0))
    assert (dz[0, 1] == 0).all() and dM.isfinite().all()


def test_gradient_is_that_of_p_when_everything_is_kept():
    z, M, g = draw(2, 3, 6, 5)
    z.requires_grad_(), M.requires_grad_()
    p = torch.softmax(torch.einsum("bld,lnd->bln", z, M), -1)
    want = torch.autograd.grad(torch.einsum("bln,lnd->bld", p, M), (z, M), g)
    got = torch.autograd.grad(space_aware_memory(z, M, 6, backend="torch"), (z, M), g)
    torch.testing.assert_close(got, want)


def test_items_outside_the_top_k_get_a_gradient():
    z, M, g = draw(1, 1, 7, 5)
    assert (run(z, M, g, 1)[2] != 0).all()


@pytest.mark.parametrize("threshold", ["inclusive", "exclusive"])
def test_topk_1_returns_the_best_item_or_zero(threshold):
    z, M, g = draw()
    out = run(z, M, g, 1, threshold=threshold)[0]
    best = torch.einsum("bld,lnd->bln", z, M).argmax(-1)
    want = torch.stack([M[torch.arange(4), best[b]] for b in range(3)])
    torch.testing.assert_close(out, want if threshold == "inclusive" else torch.zeros_like(want))


@pytest.mark.parametrize("k", [7, 8, 1000])
def test_topk_of_all_items_is_plain_softmax(k):
    z, M, g = draw()
    assert_like_by_hand(z, M, g, k)
    p = torch.softmax(torch.einsum("bld,lnd->bln", z, M), -1)
    torch.testing.assert_close(run(z, M, g, k)[0], torch.einsum("bln,lnd->bld", p, M))


def test_exclusive_keeps_one_item_fewer():
    logits = torch.tensor([3.0, 1.0, 2.0, 0.0])
    w, index = shrink(logits, torch.softmax(logits, -1), 3, "exclusive")
    assert index.tolist() == [0, 2, 1]
    assert (w > 0).tolist() == [True, False, True, False]
    assert w.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("threshold", "kept"), [("inclusive", [True, True, False, False]), ("exclusive", [True, False, False, False])]
)
def test_tie_at_rank_k_goes_to_the_lowest_index_or_is_dropped(threshold, kept):
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0])
    assert (shrink(logits, torch.softmax(logits, -1), 2, threshold)[0] > 0).tolist() == kept


@pytest.mark.parametrize("threshold", ["inclusive", "exclusive"])
def test_equal_items_give_the_item_or_zero(threshold):
    M = torch.ones(1, 5, 3, dtype=torch.float64)
    z, _, g = draw(2, 1, 5, 3)
    out = run(z, M, g, 2, threshold=threshold)[0]
    torch.testing.assert_close(out, torch.ones_like(out) if threshold == "inclusive" else torch.zeros_like(out))
    assert_like_by_hand(z, M, g, 2, threshold=threshold)


def test_order_is_right_when_the_softmax_underflows():
    z, M = torch.tensor([[[1.0]]]), torch.tensor([[[0.0], [-500.0], [-400.0]]])
    p = torch.softmax(torch.tensor([0.0, -500.0, -400.0]), -1)
    assert p[1] == p[2] == 0
    out = space_aware_memory(z, M, 2, backend="torch")
    assert out.item() == 0.0


def test_shared_memory_equals_its_copies_at_every_location():
    z, M, g = draw(shared=True)
    out, dz, dM = run(z, M, g, 3)
    wide = run(z, M.expand(4, -1, -1).contiguous(), g, 3)
    torch.testing.assert_close((out, dz, dM), (wide[0], wide[1], wide[2].sum(0, keepdim=True)))


def test_noise_decides_the_selection_and_gets_no_gradient():
    z, M, g = draw()
    noise = torch.zeros(3, 4, 7, dtype=torch.float64).requires_grad_()
    noise.data[..., 6] = 1e3
    z.requires_grad_()
    out = space_aware_memory(z, M, 1, noise=noise, backend="torch")
    torch.testing.assert_close(out, M[:, 6].expand_as(out))
    out.backward(g)
    assert noise.grad is None


def test_low_temperature_equals_topk_1():
    z, M, _ = draw()
    cold = space_aware_memory(z, M, 5, temperature=1e-4, backend="torch")
    torch.testing.assert_close(cold, space_aware_memory(z, M, 1, backend="torch"))


@pytest.mark.parametrize("threshold", ["inclusive", "exclusive"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_row_gives_nan_only_in_that_row(bad, threshold):
    z, M, _ = draw()
    z[1, 2, 3] = bad
    out = space_aware_memory(z, M, 3, threshold=threshold, backend="torch")
    assert out[1, 2].isnan().all()
    out[1, 2] = 0
    assert out.isfinite().all()


def test_noise_of_minus_infinity_excludes_an_item():
    z, M, _ = draw()
    noise = torch.zeros(3, 4, 7, dtype=torch.float64)
    noise[..., 2] = -math.inf
    hidden = space_aware_memory(z, M, 7, noise=noise, backend="torch")
    torch.testing.assert_close(hidden, space_aware_memory(z, M[:, [0, 1, 3, 4, 5, 6]], 6, backend="torch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_the_query_dtype_and_is_computed_in_float32(dtype):
    z, M, g = draw(dtype=torch.float32)
    z, g = z.to(dtype), g.to(dtype)
    out, dz, dM = run(z, M, g, 3)
    want = by_hand(z, M, 3, g=g)
    assert (out.dtype, dz.dtype, dM.dtype) == (dtype, dtype, torch.float32)
    torch.testing.assert_close((out.double(), dz.double()), want[:2], rtol=torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(dM.double(), want[2], rtol=1e-5, atol=1e-6)


def test_autocast_does_not_change_the_output():
    z, M, _ = draw(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = space_aware_memory(z, M, 3)
    assert inside.equal(space_aware_memory(z, M, 3))


def test_empty_batch_gives_empty_output():
    z, M, _ = draw(dtype=torch.float32)
    assert space_aware_memory(z[:0], M, 3).shape == (0, 4, 5)


def test_noncontiguous_inputs_equal_the_loop():
    z, M, g = draw()
    assert_like_by_hand(z.mT.contiguous().mT, M.transpose(0, 1).contiguous().transpose(0, 1), g, 3)


@pytest.mark.parametrize("topk", [np.int64(3), np.uint8(3), torch.tensor(3)], ids=["int64", "uint8", "tensor"])
def test_topk_of_any_integer_type_equals_int(topk):
    z, M, _ = draw()
    assert space_aware_memory(z, M, topk).equal(space_aware_memory(z, M, 3))


@pytest.mark.parametrize("temperature", [2, np.float32(2.0), np.float64(2.0)], ids=["int", "float32", "float64"])
def test_temperature_of_any_number_type_equals_float(temperature):
    z, M, _ = draw()
    assert space_aware_memory(z, M, 3, temperature=temperature).equal(space_aware_memory(z, M, 3, temperature=2.0))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("threshold", ["inclusive", "exclusive"])
@pytest.mark.parametrize("k", [1, 3, 7, 9], ids="k={}".format)
def test_returned_weights_rebuild_the_output(k, threshold, shared):
    z, M, _ = draw(shared=shared)
    out, index, weight = space_aware_memory(z, M, k, threshold=threshold, return_weights=True)
    assert index.shape == weight.shape == (3, 4, min(k, 7)) and index.dtype == torch.int64
    assert out.equal(space_aware_memory(z, M, k, threshold=threshold))
    items = M.expand(4, -1, -1)[torch.arange(4)[:, None], index]
    torch.testing.assert_close((weight[..., None] * items).sum(-2), out)
    scores = torch.einsum("bld,lnd->bln", z, M.expand(4, -1, -1)).gather(-1, index)
    assert (scores.diff() <= 0).all()
    assert ((weight == 0).sum(-1) == (threshold == "exclusive")).all()


def test_returned_weights_have_no_gradient():
    z, M, _ = draw()
    out, index, weight = space_aware_memory(z.requires_grad_(), M, 3, return_weights=True)
    assert out.requires_grad and not index.requires_grad and not weight.requires_grad


Z, ITEMS = torch.zeros(2, 3, 4), torch.zeros(3, 5, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], ITEMS), {}, TypeError, r"query must be a tensor of shape \[B, L, D\], got list"),
        ((Z.int(), ITEMS), {}, TypeError, r"query must be a floating-point tensor .*, got torch.int32"),
        ((Z[0], ITEMS), {}, ValueError, r"query must have shape \[B, L, D\], got \[3, 4\]"),
        ((Z, ITEMS[..., :3]), {}, ValueError, r"memory must have shape \[L or 1, N, 4\], got \[3, 5, 3\]"),
        ((Z, ITEMS.bool()), {}, TypeError, "memory must be a floating-point tensor"),
        ((Z, ITEMS[:2]), {}, ValueError, "memory must hold the items of 3 locations, or 1 shared set, got 2"),
        ((Z, ITEMS.to("meta")), {}, ValueError, "memory must be on cpu like the query, got meta"),
        ((Z, ITEMS[:, :0]), {}, ValueError, "must not be empty"),
        ((Z[..., :0], ITEMS[..., :0]), {}, ValueError, "must not be empty"),
        ((Z, ITEMS, 0), {}, ValueError, "topk must be an integer of at least 1, got 0"),
        ((Z, ITEMS, 2.0), {}, TypeError, "topk must be an integer of at least 1, got 2.0"),
        ((Z, ITEMS, True), {}, TypeError, "topk must be an integer of at least 1, got True"),
        ((Z, ITEMS, "5"), {}, TypeError, "topk must be an integer of at least 1, got '5'"),
        (
            (Z, ITEMS),
            {"threshold": "soft"},
            ValueError,
            "threshold must be one of 'inclusive', 'exclusive', got 'soft'",
        ),
        (
            (Z, ITEMS),
            {"noise": torch.zeros(2, 3, 4)},
            ValueError,
            r"noise must have shape \[2, 3, 5\], got \[2, 3, 4\]",
        ),
        ((Z, ITEMS), {"temperature": 0.0}, ValueError, "temperature must be a positive number, got 0.0"),
        ((Z, ITEMS), {"temperature": math.nan}, ValueError, "temperature must be a positive number, got nan"),
        ((Z, ITEMS), {"temperature": math.inf}, ValueError, "temperature must be a positive number, got inf"),
        ((Z, ITEMS), {"temperature": "1"}, TypeError, "temperature must be a positive number, got '1'"),
        (
            (Z, ITEMS),
            {"temperature": torch.tensor(1.0, requires_grad=True)},
            TypeError,
            "temperature must be a positive number, got a tensor, to which no gradient would be computed",
        ),
        ((Z, ITEMS), {"threshold": 1}, ValueError, "threshold must be one of 'inclusive', 'exclusive', got 1"),
        (
            (Z, ITEMS),
            {"similarity": "l2"},
            ValueError,
            "similarity must be one of 'dot', 'cosine', got 'l2'",
        ),
        ((Z, ITEMS), {"item_mask": [True]}, TypeError, r"item_mask must be a tensor of shape \[3, 5\], got list"),
        (
            (Z, ITEMS),
            {"item_mask": torch.ones(3, 5)},
            TypeError,
            "item_mask must be a boolean tensor, got torch.float32",
        ),
        (
            (Z, ITEMS),
            {"item_mask": torch.ones(1, 5).bool()},
            ValueError,
            r"item_mask must have shape \[3, 5\], got \[1, 5\]",
        ),
        ((Z, ITEMS), {"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'triton', 'torch', got 'cuda'"),
    ],
)
def test_wrong_argument_raises_one_sentence(arguments, options, error, message):
    with pytest.raises(error, match=message):
        space_aware_memory(*arguments, **options)

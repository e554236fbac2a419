"""The fused space-aware memory against its reference: on a GPU, or in Triton's interpreter."""

import math

import pytest
import torch
from harness import DEVICE, needs_kernels
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from memory_cases import (
    BFLOAT16,
    FLOAT32,
    PAIRS,
    compare,
    draw,
    draw_mask,
    gap,
    gradients,
    gradients_apart,
    kernel_names,
    roundings_of,
)

from simsid.kernels import space_aware_memory
from simsid.kernels.launch import record_launches
from simsid.kernels.memory import plan

pytestmark = [needs_kernels, pytest.mark.usefixtures("poisoned")]


# Shrinking would take minutes in the interpreter, and the shapes are small already.
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
@given(
    B=st.integers(1, 4),
    L=st.integers(1, 2),
    N=st.integers(1, 70),
    D=st.integers(1, 140),
    k=st.integers(1, 9),
    dtypes=st.sampled_from(PAIRS),
    threshold=st.sampled_from(["inclusive", "exclusive"]),
    temperature=st.sampled_from([1.0, 0.3]),
    shared=st.booleans(),
    noisy=st.booleans(),
    similarity=st.sampled_from(["dot", "cosine"]),
    masked=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_shape_and_option_agree_with_the_reference(
    B, L, N, D, k, dtypes, threshold, temperature, shared, noisy, similarity, masked, seed
):
    z, M, g, noise = draw(B, L, N, D, *dtypes, shared, noisy, seed)
    item_mask = draw_mask(M, seed) if masked else None
    assume(gap(z, M, k, noise, temperature, threshold == "exclusive", similarity, item_mask) > 2e-5)
    compare(z, M, g, k, noise, threshold, temperature, similarity, item_mask)


@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: "-".join(str(dtype)[6:] for dtype in pair))
def test_every_gradient_kernel_agrees_in_every_dtype(dtypes):
    z, M, g, _ = draw(3, 1, 20, 40, *dtypes)
    joint = compare(z, M, g, 3)
    for name, value in gradients_apart(z, M, g, 3).items():
        rounding = 2 * torch.finfo(value.dtype).eps + 2 * roundings_of(z.dtype) * 2.0**-24
        assert (value - joint[name]).abs().max() <= rounding * joint[name].abs().max()


@pytest.mark.parametrize("B", [17, 33], ids=["one wide tile", "two tiles"])
def test_batch_above_one_tile_agrees_with_the_reference(B):
    z, M, g, _ = draw(B, 1, 20, 24)
    compare(z, M, g, 3)


def test_features_in_several_splits_agree_with_the_reference():
    z, M, g, _ = draw(2, 1, 20, 300)
    assert plan.plan_scores(2, 1, 20, 300, True).splits == 3
    compare(z, M, g, 5)


@pytest.mark.parametrize("threshold", ["inclusive", "exclusive"])
def test_rows_in_several_tiles_agree_with_the_reference(threshold, monkeypatch):
    monkeypatch.setattr(plan, "MAX_TILE_ITEMS", 32)
    z, M, g, noise = draw(2, 1, 100, 8, noisy=True)
    with record_launches() as launches:
        compare(z, M, g, 5, noise, threshold)
    assert launches[1].arguments["TILES"] == 4


def test_ties_across_tiles_go_to_the_lowest_index(monkeypatch):
    monkeypatch.setattr(plan, "MAX_TILE_ITEMS", 16)
    z = torch.tensor([[[1.0, 0.0]]], device=DEVICE)
    M = torch.stack([torch.ones(40), torch.arange(40.0)], -1)[None].to(DEVICE)
    assert space_aware_memory(z, M, 3, backend="triton").tolist() == [[[1.0, 1.0]]]


def test_more_items_than_a_tile_agree_with_the_reference():
    z, M, _, _ = draw(1, 1, 5000, 8)
    want = space_aware_memory(z.double(), M.double(), 5, backend="torch")
    torch.testing.assert_close(space_aware_memory(z, M, 5, backend="triton").double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 9, 64])
def test_keeping_one_or_all_items_agrees_with_the_reference(k):
    z, M, g, _ = draw(2, 2, 9 if k < 64 else 64, 20)
    compare(z, M, g, k)


@pytest.mark.parametrize("threshold", ["inclusive", "exclusive"])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_ties_go_to_the_lowest_index(k, threshold):
    # Scores of small integers are exact in any order of summation, and tie often.
    generator = torch.Generator().manual_seed(k)
    z, M, g = (
        torch.randint(-1, 2, shape, generator=generator).float().to(DEVICE)
        for shape in [(4, 2, 6), (2, 9, 6), (4, 2, 6)]
    )
    s = torch.sort(torch.einsum("bld,lnd->bln", z, M), descending=True).values
    assert (s[..., k - 1] == s[..., k]).any()
    compare(z, M, g, k, threshold=threshold)


@pytest.mark.parametrize("threshold", ["inclusive", "exclusive"])
def test_equal_items_agree_with_the_reference(threshold):
    z, _, g, _ = draw(2, 2, 7, 5)
    compare(z, torch.ones(2, 7, 5, device=DEVICE), g, 3, threshold=threshold)


def test_zero_and_minus_zero_tie_at_the_lowest_index():
    z, M = torch.tensor([[[1.0]]], device=DEVICE), torch.tensor([[[-0.0], [0.0]]], device=DEVICE)
    noise = torch.tensor([[[-0.0, 0.0]]], device=DEVICE)
    values = torch.tensor([[[3.0], [5.0]]], device=DEVICE)
    z, M = torch.cat([z, 0 * z], -1), torch.cat([M, values], -1)
    assert space_aware_memory(z, M, 1, noise=noise, backend="triton")[0, 0, 1] == 3.0


@pytest.mark.parametrize("threshold", ["inclusive", "exclusive"])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_nonfinite_row_gives_nan_only_in_that_row(bad, threshold):
    z, M, g, _ = draw(3, 2, 9, 20)
    good = compare(z, M, g, 3, threshold=threshold)["out"]
    z[1, 1, 4] = bad
    out = space_aware_memory(z, M, 3, threshold=threshold, backend="triton")
    assert out[1, 1].isnan().all()
    good[1, 1] = out[1, 1] = 0
    assert out.equal(good)


def test_row_of_minus_infinity_gives_nan_and_reads_in_bounds():
    z, M, _, noise = draw(2, 2, 9, 20, noisy=True)
    noise[0, 0] = -math.inf
    out = space_aware_memory(z, M, 3, noise=noise, backend="triton")
    assert out[0, 0].isnan().all() and out[1].isfinite().all()


def test_noise_of_minus_infinity_excludes_items():
    z, M, g, noise = draw(2, 2, 9, 20, noisy=True)
    noise[..., ::2] = -math.inf
    compare(z, M, g, 3, noise)
    compare(z, M, g, 7, noise)


def test_scores_beyond_the_range_of_exp_agree_with_the_reference():
    z, M, g, _ = draw(2, 2, 9, 20)
    compare(100 * z, 10 * M, g, 3)


def test_noncontiguous_inputs_give_the_same_bits():
    z, M, g, noise = draw(3, 2, 9, 20, noisy=True)
    want = compare(z, M, g, 3, noise)
    views = [
        (z.transpose(0, 1).contiguous().transpose(0, 1), M.transpose(0, 1).contiguous().transpose(0, 1)),
        (z.mT.contiguous().mT, M.mT.contiguous().mT),
        (torch.cat([z, z], -1)[..., :20], torch.cat([M, M], -1)[..., :20]),
        (torch.cat([z.new_zeros(3, 2, 1), z], -1)[..., 1:], torch.cat([M.new_zeros(2, 9, 1), M], -1)[..., 1:]),
    ]
    for query, memory in views:
        assert not (query.is_contiguous() and memory.is_contiguous())
        got = compare(query, memory, g, 3, noise.transpose(0, 1).contiguous().transpose(0, 1))
        assert all(got[name].equal(want[name]) for name in want)


def test_shared_memory_with_transposed_query_gives_the_same_bits():
    z, M, g, _ = draw(2, 3, 9, 20, shared=True)
    want = compare(z, M, g, 3)
    got = compare(z.transpose(0, 1).contiguous().transpose(0, 1), M, g, 3)
    assert all(got[name].equal(want[name]) for name in want)


def test_expanded_gradient_agrees_with_the_reference():
    z, M, _, _ = draw(2, 2, 9, 20)
    compare(z, M, torch.ones((), device=DEVICE).expand(2, 2, 20), 3)


def test_two_runs_are_bitwise_equal():
    z, M, g, _ = draw(3, 1, 20, 150)
    first, second = compare(z, M, g, 5), compare(z, M, g, 5)
    assert all(first[name].equal(second[name]) for name in first)


def test_image_gives_the_same_bits_alone_and_in_a_batch():
    z, M, _, _ = draw(16, 1, 20, 300)
    together = space_aware_memory(z, M, 5, backend="triton")
    for b in (0, 7, 15):
        alone = space_aware_memory(z[b : b + 1], M, 5, backend="triton")
        assert alone.equal(together[b : b + 1])


def test_empty_batch_gives_empty_output_and_zero_gradient():
    z, M, _, _ = draw(2, 2, 9, 20)
    z, M = z[:0].requires_grad_(), M.requires_grad_()
    out = space_aware_memory(z, M, 3, backend="triton")
    out.sum().backward()
    assert out.shape == (0, 2, 20) and z.grad.shape == (0, 2, 20)
    assert M.grad.equal(torch.zeros_like(M))


@pytest.mark.parametrize("shared", [False, True], ids=["own items", "shared items"])
@pytest.mark.parametrize("threshold", ["inclusive", "exclusive"])
@pytest.mark.parametrize(("N", "k"), [(20, 3), (20, 1), (5, 9)], ids=["k=3", "k=1", "k above N"])
def test_returned_weights_equal_the_reference(N, k, threshold, shared):
    z, M, g, noise = draw(3, 2, N, 20, shared=shared, noisy=True)
    options = {"threshold": threshold, "noise": noise, "return_weights": True}
    z.requires_grad_()
    out, index, weight = space_aware_memory(z, M, k, backend="triton", **options)
    _, want_index, want_weight = space_aware_memory(z, M, k, backend="torch", **options)
    assert index.equal(want_index) and weight.dtype == FLOAT32
    torch.testing.assert_close(weight, want_weight)
    plain = space_aware_memory(z, M, k, threshold=threshold, noise=noise, backend="triton")
    assert out.equal(plain) and not weight.requires_grad
    assert torch.autograd.grad(out, z, g)[0].equal(torch.autograd.grad(plain, z, g)[0])
    inference = space_aware_memory(z.detach(), M, k, backend="triton", **options)
    assert all(a.equal(b) for a, b in zip(inference, (out, index, weight)))


def test_returned_weights_of_a_nan_row_are_nan_and_their_indices_in_range():
    z, M, _, _ = draw(2, 2, 9, 20)
    z[0, 1, 3] = math.nan
    _, index, weight = space_aware_memory(z, M, 3, backend="triton", return_weights=True)
    assert weight[0, 1].isnan().all() and weight[1].isfinite().all()
    assert ((index >= 0) & (index < 9)).all() and (index.sort(-1).values.diff() > 0).all()


def test_without_returned_weights_nothing_is_allocated_for_them():
    z, M, _, _ = draw(2, 1, 4, 8)
    with record_launches() as launches:
        space_aware_memory(z, M, 2, backend="triton")
    assert launches[1].arguments["index_ptr"] is launches[1].arguments["weight_ptr"] is None


@pytest.mark.parametrize(
    ("B", "needs", "backward"),
    [
        (2, "zM", ["scores", "softmax_gradient", "joint_gradient"]),
        (2, "z", ["scores", "softmax_gradient", "query_gradient"]),
        (2, "M", ["scores", "softmax_gradient", "items_gradient"]),
        (33, "zM", ["scores", "softmax_gradient", "query_gradient", "items_gradient"]),
    ],
)
def test_launches_depend_on_the_gradients_needed(B, needs, backward):
    z, M, g, _ = draw(B, 1, 4, 8)
    z.requires_grad_("z" in needs), M.requires_grad_("M" in needs)
    with record_launches() as forward_launches:
        out = space_aware_memory(z, M, 2, backend="triton")
    with record_launches() as backward_launches:
        out.backward(g)
    assert kernel_names(forward_launches) == ["scores", "select"]
    assert kernel_names(backward_launches) == backward
    assert (z.grad is not None, M.grad is not None) == ("z" in needs, "M" in needs)
    assert forward_launches[1].arguments["p_ptr"] is not None


def test_inference_saves_no_probabilities():
    z, M, _, _ = draw(2, 1, 4, 8)
    with record_launches() as launches, torch.no_grad():
        space_aware_memory(z, M.requires_grad_(), 2, backend="triton")
    with record_launches() as more:
        space_aware_memory(z, M.detach(), 2, backend="triton")
    assert [each[1].arguments["p_ptr"] for each in (launches, more)] == [None, None]


def test_memory_without_gradient_gives_the_same_dz():
    z, M, g, _ = draw(3, 2, 9, 20)
    want = compare(z, M, g, 3)["dz"]
    z.requires_grad_()
    space_aware_memory(z, M, 3, backend="triton").backward(g)
    torch.testing.assert_close(z.grad, want)


def test_autocast_gives_the_same_bits():
    z, M, g, _ = draw(3, 2, 9, 20, BFLOAT16)
    want = compare(z, M, g, 3)
    with torch.autocast(DEVICE.type, dtype=BFLOAT16):
        got = compare(z, M, g, 3)
    assert all(got[name].equal(want[name]) for name in want)


@pytest.mark.parametrize("shared", [False, True])
def test_ops_pass_opcheck(shared):
    z, M, g, noise = draw(2, 3, 9, 20, shared=shared, noisy=True)
    space_aware_memory(z, M, backend="triton")  # the first use registers the ops
    ops = torch.ops.simsid
    backward = ops.space_aware_memory_backward
    mask = torch.ones(M.shape[:2], dtype=torch.bool, device=DEVICE)
    mask[0, 3] = False
    for options in [(None, None, 3, False, False, 1.0, False, False), (mask, noise, 3, True, True, 0.5, True, True)]:
        torch.library.opcheck(ops.space_aware_memory.default, (z, M, *options))
    for needs, cosine in [((True, True), False), ((True, False), True), ((False, True), False)]:
        _, *saved = ops.space_aware_memory(z, M, mask, None, 3, False, cosine, 1.0, True, False)
        torch.library.opcheck(backward.default, (g, z, M, mask, saved, 1.0, *needs))


def test_compiled_op_is_one_graph_and_gives_the_same_bits():
    z, M, g, noise = draw(2, 3, 9, 20, noisy=True)
    want = compare(z, M, g, 3, noise)
    function = torch.compile(
        lambda z, M: space_aware_memory(z, M, 3, noise=noise, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    got = gradients(function, z, M, g)
    assert all(got[name].equal(want[name]) for name in want)


def test_exported_op_takes_any_batch():
    class Module(torch.nn.Module):
        def __init__(self, M):
            super().__init__()
            self.M = torch.nn.Parameter(M)

        def forward(self, z):
            return space_aware_memory(z, self.M, 3, backend="triton")

    z, M, _, _ = draw(4, 3, 9, 20)
    module = Module(M)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(module, (z,), dynamic_shapes=({0: batch},))
    assert exported.module()(z[:3]).equal(module(z[:3]))


@pytest.mark.parametrize(
    ("query", "memory", "k", "reason"),
    [
        (torch.float64, torch.float64, 3, "a query of torch.float64 has no kernel"),
        (FLOAT32, BFLOAT16, 3, "a memory of torch.bfloat16 with a query of torch.float32 has no kernel"),
        (FLOAT32, FLOAT32, 65, "65 kept items are more than the kernel's 64"),
    ],
)
def test_unsupported_argument_raises_its_reason_and_auto_takes_torch(query, memory, k, reason):
    z, M, _, _ = draw(1, 1, 70, 4, query, memory)
    with pytest.raises(RuntimeError, match=reason):
        space_aware_memory(z, M, k, backend="triton")
    assert space_aware_memory(z, M, k).equal(space_aware_memory(z, M, k, backend="torch"))

"""The fused space-aware memory against the reference: on a GPU, or in Triton's interpreter."""

import math

import pytest
import torch
from harness import DEVICE, assert_as_close_as_torch, needs_kernels, terms
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from simsid.kernels import space_aware_memory
from simsid.kernels.launch import record_launches
from simsid.kernels.memory import plan
from simsid.kernels.memory.reference import shrink, space_aware_memory_reference

pytestmark = [needs_kernels, pytest.mark.usefixtures("poisoned")]

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(FLOAT32, FLOAT32), (BFLOAT16, FLOAT32), (FLOAT16, FLOAT32), (BFLOAT16, BFLOAT16), (FLOAT16, FLOAT16)]


def draw(B, L, N, D, query=FLOAT32, memory=FLOAT32, shared=False, noisy=False, seed=0):
    """Query, memory, cotangent and noise; scores are of order 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    z, M, g = normal(B, L, D), normal(1 if shared else L, N, D) / math.sqrt(D), normal(B, L, D)
    noise = normal(B, L, N).to(DEVICE) if noisy else None
    return z.to(query).to(DEVICE), M.to(memory).to(DEVICE), g.to(query).to(DEVICE), noise


def gap(z, M, k, noise, temperature, exclusive):
    """The smallest distance between the last score that is kept and the first that is not."""
    s = torch.einsum("bld,lnd->bln", z.double(), M.double().expand(z.shape[1], -1, -1))
    s = torch.sort((s if noise is None else s + noise) / temperature, descending=True).values
    k = min(k, s.shape[-1]) - (1 if exclusive else 0)
    return math.inf if k in (0, s.shape[-1]) else (s[..., k - 1] - s[..., k]).min().item()


def gradients(function, z, M, g):
    z, M = z.detach().requires_grad_(), M.detach().requires_grad_()
    out = function(z, M)
    out.backward(g)
    return {"out": out, "dz": z.grad, "dM": M.grad}


def roundings_of(query):
    """Float32 roundings a product may be off by: a bf16 query meets float32 as a pair of bf16, to 2^-18."""
    return 64.0 if query == BFLOAT16 else 3.0


def sizes(z, M, g, k, noise, threshold, temperature):
    """The largest result there would be if nothing cancelled, by name, and the largest |z M / temperature|."""
    z, M, g = z.detach().double(), M.detach().double().expand(z.shape[1], -1, -1), g.double()
    s = torch.einsum("bld,lnd->bln", z, M)
    logits = (s if noise is None else s + noise) / temperature
    p = torch.softmax(logits, dim=-1)
    w = shrink(logits, p, k, threshold)
    ds = terms(p, torch.einsum("bld,lnd->bln", g, M)) / temperature
    results = {
        "out": torch.einsum("bln,lnd->bld", w, M.abs()),
        "dz": torch.einsum("bln,lnd->bld", ds, M.abs()),
        "dM": torch.einsum("bln,bld->lnd", w, g.abs()) + torch.einsum("bln,bld->lnd", ds, z.abs()),
    }
    return {name: value.amax().item() for name, value in results.items()}, s.abs().amax().item() / temperature


def compare(z, M, g, k, noise=None, threshold="inclusive", temperature=1.0):
    """Compare the fused output and gradients with the reference in float64, measured by the reference as it is."""

    def reference(z, M):
        return space_aware_memory_reference(z, M, k, threshold, noise, temperature)

    def fused(z, M):
        options = {"threshold": threshold, "noise": noise, "temperature": temperature}
        return space_aware_memory(z, M, k, backend="triton", **options)

    exact = gradients(reference, z.double(), M.double(), g.double())
    same, got = gradients(reference, z, M, g), gradients(fused, z, M, g)
    scale, score = sizes(z, M, g, k, noise, threshold, temperature)
    # Two products, and the one behind the scores, whose error is that of the exponent.
    slack = roundings_of(z.dtype) * (2.0 + score)
    for name in exact:
        assert_as_close_as_torch(name, got[name], same[name], exact[name], slack, scale[name])
    return got


# Shrinking would take minutes in the interpreter; the shapes are small as they are.
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
    seed=st.integers(0, 100),
)
def test_any_shape_and_option(B, L, N, D, k, dtypes, threshold, temperature, shared, noisy, seed):
    z, M, g, noise = draw(B, L, N, D, *dtypes, shared, noisy, seed)
    assume(gap(z, M, k, noise, temperature, threshold == "exclusive") > 2e-5)
    compare(z, M, g, k, noise, threshold, temperature)


@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: "-".join(str(dtype)[6:] for dtype in pair))
def test_every_dtype_by_every_gradient_kernel(dtypes):
    z, M, g, _ = draw(3, 1, 20, 40, *dtypes)
    joint = compare(z, M, g, 3)

    def fused(z, M):
        return space_aware_memory(z, M, 3, backend="triton")

    apart = {
        "dz": torch.autograd.grad(fused(z.requires_grad_(), M), z, g)[0],
        "dM": torch.autograd.grad(fused(z.detach(), M.requires_grad_()), M, g)[0],
    }
    for name, value in apart.items():
        rounding = 2 * torch.finfo(value.dtype).eps + 2 * roundings_of(z.dtype) * 2.0**-24
        assert (value - joint[name]).abs().max() <= rounding * joint[name].abs().max()


@pytest.mark.parametrize("B", [17, 33], ids=["one wide tile", "two tiles"])
def test_larger_batches(B):
    z, M, g, _ = draw(B, 1, 20, 24)
    compare(z, M, g, 3)


def test_features_over_several_splits():
    z, M, g, _ = draw(2, 1, 20, 300)
    assert plan.plan_scores(2, 1, 20, 300, True).splits == 3
    compare(z, M, g, 5)


@pytest.mark.parametrize("threshold", ["inclusive", "exclusive"])
def test_rows_over_several_tiles(threshold, monkeypatch):
    monkeypatch.setattr(plan, "MOST_ITEMS_IN_ONE_TILE", 32)
    z, M, g, noise = draw(2, 1, 100, 8, noisy=True)
    with record_launches() as launches:
        compare(z, M, g, 5, noise, threshold)
    assert launches[1].arguments["TILES"] == 4


def test_ties_across_tiles_go_to_the_lowest_index(monkeypatch):
    monkeypatch.setattr(plan, "MOST_ITEMS_IN_ONE_TILE", 16)
    z = torch.tensor([[[1.0, 0.0]]], device=DEVICE)
    M = torch.stack([torch.ones(40), torch.arange(40.0)], -1)[None].to(DEVICE)
    assert space_aware_memory(z, M, 3, backend="triton").tolist() == [[[1.0, 1.0]]]


def test_more_items_than_one_tile_holds():
    z, M, _, _ = draw(1, 1, 5000, 8)
    want = space_aware_memory(z.double(), M.double(), 5, backend="torch")
    torch.testing.assert_close(space_aware_memory(z, M, 5, backend="triton").double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 9, 64])
def test_keeping_one_and_keeping_all(k):
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
def test_equal_rows(threshold):
    z, _, g, _ = draw(2, 2, 7, 5)
    compare(z, torch.ones(2, 7, 5, device=DEVICE), g, 3, threshold=threshold)


def test_zero_and_minus_zero_tie():
    z, M = torch.tensor([[[1.0]]], device=DEVICE), torch.tensor([[[-0.0], [0.0]]], device=DEVICE)
    noise = torch.tensor([[[-0.0, 0.0]]], device=DEVICE)
    values = torch.tensor([[[3.0], [5.0]]], device=DEVICE)
    z, M = torch.cat([z, 0 * z], -1), torch.cat([M, values], -1)
    assert space_aware_memory(z, M, 1, noise=noise, backend="triton")[0, 0, 1] == 3.0


@pytest.mark.parametrize("threshold", ["inclusive", "exclusive"])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_a_row_that_is_not_finite_shows_and_stays_alone(bad, threshold):
    z, M, g, _ = draw(3, 2, 9, 20)
    good = compare(z, M, g, 3, threshold=threshold)["out"]
    z[1, 1, 4] = bad
    out = space_aware_memory(z, M, 3, threshold=threshold, backend="triton")
    assert out[1, 1].isnan().all()
    good[1, 1] = out[1, 1] = 0
    assert out.equal(good)


def test_a_row_of_minus_infinity_is_nan_and_reads_no_stray_memory():
    z, M, _, noise = draw(2, 2, 9, 20, noisy=True)
    noise[0, 0] = -math.inf
    out = space_aware_memory(z, M, 3, noise=noise, backend="triton")
    assert out[0, 0].isnan().all() and out[1].isfinite().all()


def test_noise_of_minus_infinity_hides_items():
    z, M, g, noise = draw(2, 2, 9, 20, noisy=True)
    noise[..., ::2] = -math.inf
    compare(z, M, g, 3, noise)
    compare(z, M, g, 7, noise)


def test_scores_beyond_the_range_of_the_softmax():
    z, M, g, _ = draw(2, 2, 9, 20)
    compare(100 * z, 10 * M, g, 3)


def test_non_contiguous_inputs():
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


def test_a_shared_memory_with_a_transposed_query():
    z, M, g, _ = draw(2, 3, 9, 20, shared=True)
    want = compare(z, M, g, 3)
    got = compare(z.transpose(0, 1).contiguous().transpose(0, 1), M, g, 3)
    assert all(got[name].equal(want[name]) for name in want)


def test_an_expanded_gradient():
    z, M, _, _ = draw(2, 2, 9, 20)
    compare(z, M, torch.ones((), device=DEVICE).expand(2, 2, 20), 3)


def test_two_runs_are_bitwise_equal():
    z, M, g, _ = draw(3, 1, 20, 150)
    first, second = compare(z, M, g, 5), compare(z, M, g, 5)
    assert all(first[name].equal(second[name]) for name in first)


def test_a_film_does_not_depend_on_the_batch_around_it():
    z, M, _, _ = draw(16, 1, 20, 300)
    together = space_aware_memory(z, M, 5, backend="triton")
    for b in (0, 7, 15):
        alone = space_aware_memory(z[b : b + 1], M, 5, backend="triton")
        assert alone.equal(together[b : b + 1])


def test_an_empty_batch():
    z, M, _, _ = draw(2, 2, 9, 20)
    z, M = z[:0].requires_grad_(), M.requires_grad_()
    out = space_aware_memory(z, M, 3, backend="triton")
    out.sum().backward()
    assert out.shape == (0, 2, 20) and z.grad.shape == (0, 2, 20)
    assert M.grad.equal(torch.zeros_like(M))


def names(launches):
    return [launched.kernel.fn.__name__.removeprefix("memory_").removesuffix("_kernel") for launched in launches]


@pytest.mark.parametrize(
    ("B", "needs", "backward"),
    [
        (2, "zM", ["scores", "softmax_gradient", "joint_gradient"]),
        (2, "z", ["scores", "softmax_gradient", "query_gradient"]),
        (2, "M", ["scores", "softmax_gradient", "items_gradient"]),
        (33, "zM", ["scores", "softmax_gradient", "query_gradient", "items_gradient"]),
    ],
)
def test_launches_are_counted(B, needs, backward):
    z, M, g, _ = draw(B, 1, 4, 8)
    z.requires_grad_("z" in needs), M.requires_grad_("M" in needs)
    with record_launches() as forward_launches:
        out = space_aware_memory(z, M, 2, backend="triton")
    with record_launches() as backward_launches:
        out.backward(g)
    assert names(forward_launches) == ["scores", "select"]
    assert names(backward_launches) == backward
    assert (z.grad is not None, M.grad is not None) == ("z" in needs, "M" in needs)
    assert forward_launches[1].arguments["p_ptr"] is not None


def test_inference_saves_nothing():
    z, M, _, _ = draw(2, 1, 4, 8)
    with record_launches() as launches, torch.no_grad():
        space_aware_memory(z, M.requires_grad_(), 2, backend="triton")
    with record_launches() as more:
        space_aware_memory(z, M.detach(), 2, backend="triton")
    assert [each[1].arguments["p_ptr"] for each in (launches, more)] == [None, None]


def test_a_memory_without_gradient_gives_the_same_dz():
    z, M, g, _ = draw(3, 2, 9, 20)
    want = compare(z, M, g, 3)["dz"]
    z.requires_grad_()
    space_aware_memory(z, M, 3, backend="triton").backward(g)
    torch.testing.assert_close(z.grad, want)


def test_autocast_leaves_the_memory_alone():
    z, M, g, _ = draw(3, 2, 9, 20, BFLOAT16)
    want = compare(z, M, g, 3)
    with torch.autocast(DEVICE.type, dtype=BFLOAT16):
        got = compare(z, M, g, 3)
    assert all(got[name].equal(want[name]) for name in want)


@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(shared):
    z, M, g, noise = draw(2, 3, 9, 20, shared=shared, noisy=True)
    space_aware_memory(z, M, backend="triton")  # the first use registers the ops
    op, backward = torch.ops.simsid.space_aware_memory, torch.ops.simsid.space_aware_memory_backward
    for arguments in [(z, M, 3, False, None, 1.0, False), (z, M, 3, True, noise, 0.5, True)]:
        torch.library.opcheck(op.default, arguments)
    _, p = op(z, M, 3, False, None, 1.0, True)
    for needs in [(True, True), (True, False), (False, True)]:
        torch.library.opcheck(backward.default, (g, z, M, p, 1.0, *needs))


def test_compile_has_no_graph_break_forward_or_backward():
    z, M, g, noise = draw(2, 3, 9, 20, noisy=True)
    want = compare(z, M, g, 3, noise)
    function = torch.compile(
        lambda z, M: space_aware_memory(z, M, 3, noise=noise, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    got = gradients(function, z, M, g)
    assert all(got[name].equal(want[name]) for name in want)


def test_export():
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


def test_a_second_derivative_is_one_clear_error():
    z, M, g, _ = draw(2, 1, 4, 8)
    z.requires_grad_()
    (dz,) = torch.autograd.grad(space_aware_memory(z, M, 2, backend="triton"), z, g, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative; use backend=\"torch\""):
        dz.sum().backward()


def test_torch_func_is_one_clear_error():
    z, M, g, _ = draw(2, 1, 4, 8)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda z: (space_aware_memory(z, M, 2, backend="triton") * g).sum())(z)


@pytest.mark.parametrize(
    ("query", "memory", "k", "reason"),
    [
        (torch.float64, torch.float64, 3, "a query of torch.float64 has no kernel"),
        (FLOAT32, BFLOAT16, 3, "a memory of torch.bfloat16 with a query of torch.float32 has no kernel"),
        (FLOAT32, FLOAT32, 65, "65 kept items are more than the kernel's 64"),
    ],
)
def test_what_has_no_kernel_is_refused_by_name_and_falls_back(query, memory, k, reason):
    z, M, _, _ = draw(1, 1, 70, 4, query, memory)
    with pytest.raises(RuntimeError, match=reason):
        space_aware_memory(z, M, k, backend="triton")
    assert space_aware_memory(z, M, k).equal(space_aware_memory(z, M, k, backend="torch"))

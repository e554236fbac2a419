"""The fused neighbor attention against its reference: on a GPU, or in Triton's interpreter; its compiled code."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from attention_cases import NAMES, assert_fused_is_right, draw, inputs, run, window_of
from harness import DEVICE, needs_compiler, needs_kernels, reports_of
from hypothesis import HealthCheck, given, settings

from simsid.kernels import neighbor_attention
from simsid.kernels.attention.plan import plan_grid
from simsid.kernels.attention.reference import NEIGHBORS
from simsid.kernels.launch import record_launches

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = needs_kernels


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize(
    ("grid", "features", "heads"),
    [((4, 4), 128, 8), ((2, 2), 256, 1), ((3, 3), 64, 2), ((4, 4), 40, 8), ((8, 8), 16, 1), ((16, 16), 16, 2)],
)
def test_presets_agree_with_the_reference(poisoned, grid, features, heads, pads):
    assert_fused_is_right(inputs(2, grid, features, pads=pads), grid, heads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pads", [False, True])
def test_16_bit_inputs_agree_with_the_reference(poisoned, dtype, pads):
    assert_fused_is_right(inputs(2, (3, 4), 48, pads=pads, dtype=dtype), (3, 4), 2)


def test_float32_pads_of_16_bit_inputs_keep_their_dtype(poisoned):
    tensors = inputs(2, (3, 3), 16, dtype=torch.bfloat16, pad_dtype=torch.float32)
    assert_fused_is_right(tensors, (3, 3), 2)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert_fused_is_right(tensors, (3, 3), 2)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2),
    grid=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    heads=st.integers(1, 2),
    width=st.integers(1, 40),
    pads=st.booleans(),
    dtype=st.sampled_from(FLOATS),
)
def test_any_shape_agrees_with_the_reference(poisoned, batch, grid, heads, width, pads, dtype):
    assert_fused_is_right(inputs(batch, grid, heads * width, pads=pads, dtype=dtype), grid, heads)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel_size=st.sampled_from([1, 3, (1, 3), (5, 1), (1, 9)]),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    include_center=st.booleans(),
    keys=st.sampled_from([None, 0.0, 0.5, 1.0]),  # of the locations take part
    pads=st.booleans(),
    dtype=st.sampled_from(FLOATS),
)
def test_any_window_and_mask_agree_with_the_reference(
    poisoned, grid, kernel_size, dilation, include_center, keys, pads, dtype
):
    options = {"kernel_size": kernel_size, "dilation": dilation}
    options["include_center"] = include_center or kernel_size == 1
    tensors = inputs(2, grid, 10, pads=pads, dtype=dtype)
    mask = None if keys is None else draw(2, grid[0] * grid[1], seed=8).argsort(1).argsort(1) < keys * grid[0] * grid[1]
    assert_fused_is_right(tensors, grid, 2, mask, **options)


@pytest.mark.parametrize("pads", [False, True])
def test_key_and_value_side_by_side_give_the_bits_of_two_tensors(poisoned, pads):
    tensors, cotangent = inputs(2, (2, 3), 8, pads=pads), draw(2, 6, 8, seed=9)
    both = {"query": tensors["query"], "key": torch.cat([tensors["key"], tensors["value"]], -1)}
    if pads:
        both["pad_key"] = torch.cat([tensors["pad_key"], tensors["pad_value"]])
    want, got = run(tensors, (2, 3), 2, cotangent), run(both, (2, 3), 2, cotangent, value=None)
    assert got["out"].equal(want["out"]) and got["query"].equal(want["query"])
    assert got["key"].equal(torch.cat([want["key"], want["value"]], -1))
    assert not pads or got["pad_key"].equal(torch.cat([want["pad_key"], want["pad_value"]]))


def test_masked_key_is_kept_out_even_if_it_is_not_finite():
    tensors, mask = inputs(1, (3, 3), 8), torch.ones(1, 9, dtype=torch.bool, device=DEVICE)
    tensors["key"][0, 4], tensors["value"][0, 4], mask[0, 4] = float("nan"), float("inf"), False
    got = run(tensors, (3, 3), 2, draw(1, 9, 8, seed=9), key_mask=mask)
    assert all(x.isfinite().all() for x in got.values())
    assert not got["key"][0, 4].any() and not got["value"][0, 4].any() and got["value"].any()


def test_views_and_unaligned_starts_equal_their_copies(poisoned):
    grid, features, heads = (2, 3), 24, 2
    copies = inputs(2, grid, features)
    packed = torch.cat([copies[name] for name in NAMES[:3]], dim=-1)
    flat = torch.zeros(copies["key"].numel() + 1, device=DEVICE)
    flat[1:] = copies["key"].flatten()
    views = {
        "query": packed[..., :features],
        "key": flat[1:].view_as(copies["key"]),
        "value": copies["value"].permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "pad_key": copies["pad_key"].repeat_interleave(2)[::2],
        "pad_value": copies["pad_value"],
    }
    cotangent = draw(features, seed=9).expand(2, 6, features)
    want = run(copies, grid, heads, cotangent.contiguous())
    got = run(views, grid, heads, cotangent)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=2e-6, msg=name)
    assert views["key"].data_ptr() % 16 and not views["value"].is_contiguous()


@pytest.mark.parametrize("pads", [False, True])
def test_two_runs_and_every_batch_give_the_same_bits(pads):
    grid, features, heads = (3, 3), 21, 3  # 189 numbers an image: most images of a batch start unaligned
    tensors, cotangent = inputs(3, grid, features, pads=pads), draw(3, 9, features, seed=9)
    first, second = run(tensors, grid, heads, cotangent), run(tensors, grid, heads, cotangent)
    alone = {name: x if name.startswith("pad") else x[1:2] for name, x in tensors.items()}
    single = run(alone, grid, heads, cotangent[1:2])
    for name in first:
        assert torch.equal(first[name], second[name]), name
        if not name.startswith("pad"):
            assert torch.equal(first[name][1:2], single[name]), name


@pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_value_reaches_only_the_locations_that_see_it(bad):
    for name, pads in itertools.product(NAMES[:3], (False, True)):
        tensors = inputs(2, (4, 4), 16, pads=pads)
        tensors[name][1, 5, 3] = bad
        fused, torch_out = run(tensors, (4, 4), 2)["out"], run(tensors, (4, 4), 2, backend="torch")["out"]
        assert torch.equal(fused.isfinite(), torch_out.isfinite()), name
        assert not fused.isfinite().all() and fused[0].isfinite().all(), name


def test_nonfinite_pad_reaches_only_the_border():
    tensors = inputs(1, (3, 3), 8)
    tensors["pad_value"][:] = float("nan")
    finite = run(tensors, (3, 3), 1)["out"].isfinite().all(-1)
    assert finite.tolist() == [[False] * 4 + [True] + [False] * 4]


def test_huge_logits_do_not_overflow(poisoned):
    tensors = inputs(1, (3, 3), 16)
    tensors["query"] = 1e4 * tensors["query"]
    assert_fused_is_right(tensors, (3, 3), 2)


def test_equal_locations_get_equal_weights():
    tensors = {name: torch.ones(1, 9, 8, device=DEVICE) for name in NAMES[:3]}
    torch.testing.assert_close(run(tensors, (3, 3), 2)["out"], torch.ones(1, 9, 8, device=DEVICE))


@pytest.mark.parametrize("pads", [False, True])
def test_empty_batch_launches_nothing(pads):
    tensors = inputs(0, (2, 2), 8, pads=pads)
    with record_launches() as launches:
        got = run(tensors, (2, 2), 2, draw(0, 4, 8))
    assert not launches and got["out"].shape == (0, 4, 8)
    assert not pads or torch.equal(got["pad_key"], torch.zeros(8, device=DEVICE))


@pytest.mark.parametrize("pads", [False, True])
def test_one_launch_forward_and_one_backward_and_one_for_the_pads(pads):
    tensors = inputs(3, (4, 4), 16, pads=pads)
    with record_launches(run=False) as forward:
        run(tensors, (4, 4), 2)
    with record_launches(run=False) as both:
        run(tensors, (4, 4), 2, draw(3, 16, 16))
    assert [launch.grid for launch in forward] == [(6,)]
    assert [launch.kernel.__name__ for launch in both] == [
        "neighbor_attention_forward_kernel",
        "neighbor_attention_backward_kernel",
        *(["sum_parts_kernel"] if pads else []),
    ]


def test_only_inputs_that_require_a_gradient_get_one():
    tensors = inputs(1, (2, 2), 8)
    tensors["value"].requires_grad_()
    out = neighbor_attention(grid=(2, 2), heads=2, backend="triton", **tensors)
    out.sum().backward()
    assert tensors["value"].grad is not None and tensors["pad_key"].grad is None


def test_auto_launches_only_on_cuda():
    tensors = inputs(1, (2, 2), 8)
    with record_launches() as launches:
        run(tensors, (2, 2), 2, backend="auto")
    assert len(launches) == (DEVICE.type == "cuda")


@pytest.mark.parametrize(
    ("tensors", "grid", "reason"),
    [
        (inputs(1, (2, 2), 8, dtype=torch.float64), (2, 2), "float64 has no kernel"),
        (inputs(1, (1, 257), 8), (1, 257), "257 locations are more than the 256 that one program can hold"),
    ],
)
def test_unsupported_argument_raises_its_reason_and_auto_takes_torch(tensors, grid, reason):
    with pytest.raises(RuntimeError, match=reason):
        run(tensors, grid, 2)
    assert run(tensors, grid, 2, backend="auto")["out"].isfinite().all()


def test_large_window_raises_its_reason_and_auto_takes_torch():
    tensors = inputs(1, (4, 4), 8)
    with pytest.raises(RuntimeError, match="24 keys in a window are more than the 9 that one program can hold"):
        run(tensors, (4, 4), 2, kernel_size=5)
    assert run(tensors, (4, 4), 2, backend="auto", kernel_size=5)["out"].isfinite().all()


def test_ops_pass_opcheck():
    import simsid.kernels.attention.fused  # noqa: F401  # registers the ops

    tensors = tuple(inputs(2, (2, 3), 8).values())
    ops = torch.ops.simsid
    mask, packed = draw(2, 6) > 0, torch.cat(tensors[1:3], -1)
    cases = [
        (*tensors, None, (2, 3), 2, NEIGHBORS),
        (*tensors[:3], None, None, mask, (2, 3), 2, window_of((1, 3), 2, True)),
        (tensors[0], packed, None, torch.cat(tensors[3:]), None, None, (2, 3), 2, NEIGHBORS),
    ]
    for arguments in cases:
        torch.library.opcheck(ops.neighbor_attention.default, arguments)
        torch.library.opcheck(ops.neighbor_attention_backward.default, (draw(2, 6, 8), *arguments))


@pytest.mark.parametrize(
    ("pads", "options"),
    [(False, {}), (True, {}), (True, {"kernel_size": (1, 3), "dilation": 2, "include_center": True})],
    ids=["no pads", "pads", "window and mask"],
)
def test_compiled_op_is_one_graph_and_agrees(pads, options):
    torch._dynamo.reset()
    leaves = [x.requires_grad_() for x in inputs(2, (2, 3), 8, pads=pads).values()]
    options = options | {"key_mask": draw(2, 6, seed=7) > 0 if options else None, "backend": "triton"}

    def call(*tensors):
        return neighbor_attention(grid=(2, 3), heads=2, **dict(zip(NAMES, tensors)), **options) * 2

    cotangent = draw(2, 6, 8, seed=9)
    want, compiled = call(*leaves), torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), want)
    got = torch.autograd.grad(compiled(*leaves), leaves, cotangent)
    torch.testing.assert_close(got, torch.autograd.grad(want, leaves, cotangent))


def test_inductor_output_agrees():
    torch._dynamo.reset()
    tensors = inputs(2, (2, 3), 8)
    call = torch.compile(lambda **x: neighbor_attention(grid=(2, 3), heads=2, backend="triton", **x), fullgraph=True)
    torch.testing.assert_close(call(**tensors), run(tensors, (2, 3), 2)["out"])


def test_exported_op_is_one_call_and_agrees():
    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return neighbor_attention(query, key, value, (2, 3), 2, backend="triton")

    tensors = tuple(inputs(2, (2, 3), 8, pads=False).values())
    exported = torch.export.export(Attention(), tensors)
    assert "simsid.neighbor_attention" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(*tensors), Attention()(*tensors))


def test_plan_covers_the_grid_with_one_vector_a_thread():
    for locations, width, size in itertools.product(range(1, 257), (1, 5, 8, 16, 32, 64, 100, 256, 1024), (2, 4)):
        tile = plan_grid(locations, width, size)
        vector = 16 // size
        assert tile.block_l >= locations and tile.block_l < 2 * locations
        assert tile.num_warps in (1, 2, 4, 8) and tile.block_w & (tile.block_w - 1) == 0
        assert tile.block_w <= 32 * vector, "a location's row must stay within a warp"
        assert tile.block_l * tile.block_w <= 32 * vector * tile.num_warps, "eight slots of one vector are 32 registers"
        full = tile.block_l * tile.block_w == 32 * vector * tile.num_warps
        assert full or tile.num_warps == 1, "slots would spread over the warps"


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "architectures"),
    [
        ("4x4 D=512 float32 pads", (80, 90, 100)),
        ("2x2 D=2048 float32 pads", (80,)),
        ("16x16 D=512 bfloat16 pads", (90,)),
    ],
)
def test_compiled_kernels_stay_in_registers_with_wide_accesses(shape, architectures):
    reports = [r for r in reports_of("attention", shape, architectures) if r["name"].endswith(f"ward {shape}]")]
    assert len(reports) == 2 * len(architectures), "forward and backward"
    for report in reports:
        name = f"{report['name']} sm_{report['arch']}"
        assert report["stack"] == report["spills"] == report["atomics"] == 0, name
        assert report["hmma"] == report["hgmma"] == report["utcmma"] == 0, f"{name}: products must be exact in float32"
        assert report["registers"] <= 192, name
        if "forward" in name:
            assert report["barriers"] == report["shared"] == report["narrow"] == 0, name
        else:
            assert report["shared"] <= 8192 and report["narrow"] <= 2, name

"""Residual + LayerNorm + ReLU: the reference against a float64 loop, the Triton kernels against the reference."""

import hypothesis.strategies as st
import pytest
import torch
from harness import DEVICE, needs_compiler, needs_kernels, reports_of
from hypothesis import HealthCheck, given, settings
from norm_cases import assert_fused_is_right, draw, inputs, run

from simsid.kernels import residual_layer_norm
from simsid.kernels.launch import record_launches
from simsid.kernels.layer_norm import plan

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def test_reference_equals_a_loop():
    tensors = {name: tensor.double() for name, tensor in inputs((3, 2, 7)).items()}
    got = residual_layer_norm(**tensors, eps=0.1)
    for index in ((i, j) for i in range(3) for j in range(2)):
        row = tensors["x"][index]
        deviation = row - row.sum() / 7
        normed = deviation / ((deviation * deviation).sum() / 7 + 0.1) ** 0.5
        want = (normed * tensors["weight"] + tensors["bias"] + tensors["residual"][index]).clamp(min=0)
        torch.testing.assert_close(got[index], want, rtol=1e-12, atol=1e-12)


def test_reference_passes_gradcheck():
    leaves = [tensor.double().requires_grad_() for tensor in inputs((4, 5)).values()]
    assert torch.autograd.gradcheck(lambda *x: residual_layer_norm(*x, backend="torch"), leaves)


GOOD = inputs((2, 6), torch.float64)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x must be a tensor of shape \[..., D\], got list"),
        ({"x": draw(2, 6).long()}, TypeError, "x must be a floating-point tensor .* got torch.int64"),
        ({"x": draw(1)[0]}, ValueError, r"x must have shape \[..., D\], got \[\]"),
        ({"x": draw(2, 0)}, ValueError, r"x must have at least one feature, got shape \[2, 0\]"),
        ({"residual": draw(2, 5)}, ValueError, r"residual must have shape \[2, 6\], got \[2, 5\]"),
        ({"weight": draw(5)}, ValueError, r"weight must have shape \[6\], got \[5\]"),
        ({"bias": draw(1, 6)}, ValueError, r"bias must have shape \[6\], got \[1, 6\]"),
        ({"bias": draw(6).to("meta")}, ValueError, r"bias must be on c.* like x, got meta"),
        ({"eps": 0.0}, ValueError, "eps must be a positive number, got 0.0"),
        ({"eps": torch.tensor(1e-5)}, TypeError, "eps must be a positive number, got a tensor"),
        ({"eps": None}, TypeError, "eps must be a positive number, got None"),
        ({"weight": None}, TypeError, r"weight must be a tensor of shape \[6\], got NoneType"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'triton', 'torch', got 'cuda'"),
    ],
)
def test_wrong_argument_raises_one_sentence(change, kind, message):
    with pytest.raises(kind, match=message):
        residual_layer_norm(**{**GOOD, **change})


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(4, 3, 64), (5, 100), (1,), (7,), (2, 513)])
def test_shapes_and_dtypes_agree_with_the_reference(poisoned, shape, dtype):
    assert_fused_is_right(inputs(shape, dtype))


@needs_kernels
def test_programs_of_several_rows_agree_with_the_reference(poisoned, monkeypatch):
    monkeypatch.setattr(plan, "MAX_PARTS", 3)
    assert_fused_is_right(inputs((7, 16)))


@needs_kernels
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 4),
    features=st.integers(8, 300),
    dtype=st.sampled_from(FLOATS),
    residual_dtype=st.sampled_from(FLOATS),
    weight_dtype=st.sampled_from(FLOATS),
)
def test_any_shape_and_mixture_of_dtypes_agree_with_the_reference(
    poisoned, rows, features, dtype, residual_dtype, weight_dtype
):
    assert_fused_is_right(inputs((rows, features), dtype, residual_dtype, weight_dtype))


@needs_kernels
@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_large_mean_costs_only_its_own_rounding(poisoned, mean):
    tensors = inputs((4, 64))
    tensors["x"] = tensors["x"] + mean
    assert_fused_is_right(tensors, scale=mean)


@needs_kernels
@pytest.mark.parametrize("scale", [1e-18, 1e18, 1e20, 1e37])
@pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")
def test_squares_beyond_float32_do_not_lose_the_row(poisoned, scale):
    tensors = inputs((4, 64))
    tensors["x"] = tensors["x"] * scale
    tensors["x"][0, :] = 3e38  # a sum that overflows, of equal numbers
    want = residual_layer_norm(**{name: x.double() for name, x in tensors.items()}, backend="torch")
    got = run(tensors, draw(4, 64))
    torch.testing.assert_close(got["out"][1:].double(), want[1:], rtol=1e-5, atol=1e-5)
    assert all(x.isfinite().all() for x in got.values())


@needs_kernels
def test_views_and_unaligned_starts_equal_their_copies(poisoned):
    copies = inputs((2, 3, 20))
    flat = torch.zeros(121, device=DEVICE)
    flat[1:] = copies["residual"].flatten()
    views = {
        "x": copies["x"].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "residual": flat[1:].view(2, 3, 20),
        "weight": copies["weight"].repeat_interleave(2)[::2],
        "bias": copies["bias"],
    }
    cotangent = draw(20, seed=9).expand(2, 3, 20)
    want, got = run(copies, cotangent.contiguous()), run(views, cotangent)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=2e-6, msg=name)


@needs_kernels
def test_two_runs_and_every_batch_give_the_same_bits():
    tensors, cotangent = inputs((5, 21)), draw(5, 21, seed=9)
    first, second = run(tensors, cotangent), run(tensors, cotangent)
    alone = {name: x[3:4] if x.dim() == 2 else x for name, x in tensors.items()}
    single = run(alone, cotangent[3:4])
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name][3:4], single[name]) for name in ("out", "x", "residual"))


@needs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x", "residual"])
@pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")
def test_nonfinite_value_reaches_only_its_row(name, bad):
    tensors = inputs((3, 16))
    tensors[name][1, 4] = bad
    got, want = run(tensors)["out"], run(tensors, backend="torch")["out"]
    torch.testing.assert_close(got, want, equal_nan=True)
    assert not got[1].isfinite().all() and got[[0, 2]].isfinite().all()


@needs_kernels
def test_equal_features_give_the_bias():
    tensors = {**inputs((2, 8)), "x": torch.full((2, 8), 3.0, device=DEVICE)}
    torch.testing.assert_close(run(tensors)["out"], torch.relu(tensors["bias"] + tensors["residual"]))


@needs_kernels
def test_one_launch_forward_and_two_backward():
    tensors = inputs((4, 8))
    with record_launches(run=False) as forward:
        run(tensors)
    with record_launches(run=False) as both:
        run(tensors, draw(4, 8))
    with record_launches(run=False) as none:
        run(inputs((0, 8)), draw(0, 8))
    assert (len(forward), len(both), len(none)) == (1, 3, 0)  # the last one adds up the gradients of weight and bias


@needs_kernels
@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (inputs((2, 4), torch.float64), "float64 has no kernel"),
        (inputs((1, 8193)), "rows of 8193 features are longer than the 8192 that one program can hold"),
    ],
)
def test_unsupported_argument_raises_its_reason_and_auto_takes_torch(tensors, reason):
    with pytest.raises(RuntimeError, match=reason):
        run(tensors)
    assert run(tensors, backend="auto")["out"].isfinite().all()


@needs_kernels
def test_ops_pass_opcheck():
    import simsid.kernels.layer_norm.fused  # noqa: F401  # registers the ops

    tensors = inputs((3, 8), torch.bfloat16)
    out, statistics = torch.ops.simsid.residual_layer_norm(*tensors.values(), 1e-5)
    torch.library.opcheck(torch.ops.simsid.residual_layer_norm.default, (*tensors.values(), 1e-5))
    dtypes = torch.float32, torch.float16
    backward = (draw(3, 8, dtype=out.dtype), tensors["x"], tensors["weight"], out, statistics, *dtypes)
    torch.library.opcheck(torch.ops.simsid.residual_layer_norm_backward.default, backward)


@needs_kernels
def test_compiled_and_exported_op_is_one_graph_and_agrees():
    class Block(torch.nn.Module):
        def forward(self, *tensors):
            return residual_layer_norm(*tensors, backend="triton") * 2

    torch._dynamo.reset()
    leaves = tuple(x.requires_grad_() for x in inputs((3, 8)).values())
    want, got = Block()(*leaves), torch.compile(Block(), fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(got, want)
    cotangent = draw(3, 8, seed=9)
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, cotangent), torch.autograd.grad(want, leaves, cotangent)
    )
    exported = torch.export.export(Block(), tuple(x.detach() for x in leaves))
    assert "simsid.residual_layer_norm" in exported.graph_module.code


def test_plan_holds_a_row_in_at_most_16_registers_a_thread():
    for features in range(1, 8193):
        row = plan.plan_row(features)
        assert features <= row.block_d < 2 * features and row.num_warps in (1, 2, 4, 8, 16)
        assert row.block_d <= 16 * 32 * row.num_warps


def test_plan_gives_every_row_to_one_program():
    for rows in (0, 1, 127, 128, 129, 1000, 4096):
        sums = plan.plan_parts(rows)
        assert (sums.parts - 1) * sums.rows_per_program < max(rows, 1) and rows <= sums.parts * sums.rows_per_program
        assert sums.parts <= plan.MAX_PARTS


@needs_compiler
def test_compiled_kernels_do_not_spill():
    reports = reports_of("layer_norm", "D=8192 float32", (90,))
    assert len(reports) == 2, "forward and backward, whatever the number of rows"
    for report in reports:
        assert report["stack"] == report["spills"] == report["atomics"] == 0, report["name"]
        assert report["registers"] <= 128, f"{report['name']}: 16 warps have no more"
        assert report["wide"] >= 20 and report["narrow"] == 2, f"{report['name']}: only statistics are narrow"

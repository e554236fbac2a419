"""Neighbor attention in plain PyTorch: against a float64 loop, against nn.MultiheadAttention, and its errors."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from simsid.kernels import neighbor_attention
from simsid.kernels.attention import reference
from simsid.kernels.attention.plan import Window
from simsid.kernels.attention.reference import NEIGHBORS, neighbor_index, offsets

GRIDS = [(1, 1), (1, 5), (4, 1), (2, 2), (3, 3), (2, 5), (4, 4)]


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


def inputs(batch, grid, features, *, pads, dtype=torch.float64):
    rows, columns = grid
    qkv = [draw(batch, rows * columns, features, dtype=dtype, seed=seed) for seed in (1, 2, 3)]
    pair = [draw(features, dtype=dtype, seed=seed) for seed in (4, 5)] if pads else [None, None]
    return [x if x is None else x.requires_grad_() for x in qkv + pair]


def loop(query, key, value, grid, heads, pad_key, pad_value, window=NEIGHBORS, key_mask=None):
    """Compute the definition one location and head at a time."""
    rows, columns = grid
    width = query.shape[-1] // heads
    out = torch.zeros_like(query)
    for b, i, j, h in torch.cartesian_prod(*map(torch.arange, (len(query), rows, columns, heads))).tolist():
        own = slice(h * width, (h + 1) * width)
        keys, values = [], []
        for di, dj in offsets(window):
            if 0 <= i + di < rows and 0 <= j + dj < columns:
                at = (i + di) * columns + j + dj
                if key_mask is None or key_mask[b, at]:
                    keys.append(key[b, at, own])
                    values.append(value[b, at, own])
            elif pad_key is not None:
                keys.append(pad_key[own])
                values.append(pad_value[own])
        if keys:
            weight = torch.softmax(torch.stack(keys) @ query[b, i * columns + j, own] / math.sqrt(width), dim=0)
            out[b, i * columns + j, own] = weight @ torch.stack(values)
    return out


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_reference_equals_the_loop_forward_and_backward(grid, pads):
    leaves = inputs(2, grid, 6, pads=pads)
    query, key, value, pad_key, pad_value = leaves
    got = neighbor_attention(query, key, value, grid, heads=2, pad_key=pad_key, pad_value=pad_value)
    want = loop(query.detach(), key.detach(), value.detach(), grid, 2, pad_key, pad_value)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)

    def call(query, key, value, pad_key=None, pad_value=None):
        return neighbor_attention(query, key, value, grid, 2, pad_key=pad_key, pad_value=pad_value)

    assert torch.autograd.gradcheck(call, [x for x in leaves if x is not None], fast_mode=True)


WINDOWS = {
    "with center": {"include_center": True},
    "one cell": {"kernel_size": 1, "include_center": True},
    "row of five": {"kernel_size": (1, 5)},
    "5x3 with gaps": {"kernel_size": (5, 3), "dilation": (1, 2)},
    "gaps wider than the grid": {"dilation": 9},
    "7x7 with center": {"kernel_size": 7, "include_center": True},
}


def window_of(kernel_size=3, dilation=1, include_center=False):
    pairs = [x if isinstance(x, tuple) else (x, x) for x in (kernel_size, dilation)]
    return Window(*pairs[0], *pairs[1], include_center)


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("pads", [False, True], ids=["", "pads"])
@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
def test_any_window_and_mask_equals_the_loop_forward_and_backward(options, pads, masked):
    leaves = inputs(2, (3, 4), 4, pads=pads)
    query, key, value, pad_key, pad_value = leaves
    mask = draw(2, 12) > 0.4 if masked else None
    want = loop(query.detach(), key.detach(), value.detach(), (3, 4), 2, pad_key, pad_value, window_of(**options), mask)

    def call(query, key, value, pad_key=None, pad_value=None):
        pads = {"pad_key": pad_key, "pad_value": pad_value}
        return neighbor_attention(query, key, value, (3, 4), 2, key_mask=mask, **pads, **options)

    given = [x for x in leaves if x is not None]
    torch.testing.assert_close(call(*given), want, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(call, given, fast_mode=True)


def test_masked_key_is_kept_out_even_if_it_is_not_finite():
    query, key, value, *_ = inputs(1, (3, 3), 8, pads=False)
    with torch.no_grad():
        key[0, 4], value[0, 4] = float("nan"), float("inf")
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[0, 4] = False
    out = neighbor_attention(query, key, value, (3, 3), 2, key_mask=mask)
    out.sum().backward()
    assert out.isfinite().all() and all(x.grad.isfinite().all() for x in (query, key, value))
    assert not key.grad[0, 4].any() and not value.grad[0, 4].any() and value.grad.any()


@pytest.mark.parametrize("pads", [False, True], ids=["", "pads"])
def test_location_whose_keys_are_all_masked_gives_zeros_or_the_pad_value(pads):
    query, key, value, pad_key, pad_value = inputs(1, (3, 3), 8, pads=pads)
    mask = torch.zeros(1, 9, dtype=torch.bool)
    out = neighbor_attention(query, key, value, (3, 3), 2, key_mask=mask, pad_key=pad_key, pad_value=pad_value)
    want = torch.zeros_like(out) if pad_value is None else pad_value.expand_as(out).clone()
    want[0, 4] = 0  # it has no neighbor outside the grid
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("pads", [False, True], ids=["", "pads"])
def test_key_and_value_side_by_side_equal_two_tensors(pads):
    query, key, value, pad_key, pad_value = inputs(2, (2, 3), 8, pads=pads)
    want = neighbor_attention(query, key, value, (2, 3), 2, pad_key=pad_key, pad_value=pad_value)
    both = torch.cat([key, value], -1)
    got = neighbor_attention(query, both, None, (2, 3), 2, pad_key=torch.cat([pad_key, pad_value]) if pads else None)
    assert got.equal(want)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 4)])
def test_op_with_projections_equals_multihead_attention_over_padded_windows(grid):
    batch, features, heads = 2, 8, 4
    rows, columns = grid
    attention = nn.MultiheadAttention(features, heads, batch_first=True, dtype=torch.float64)
    nn.init.normal_(attention.in_proj_bias)
    f, n = draw(batch, rows * columns, features, seed=1), draw(batch, rows * columns, features, seed=2)

    windows = functional.unfold(n.transpose(1, 2).unflatten(-1, grid), 3, padding=1).unflatten(1, (features, 9))
    around = windows[:, :, [0, 1, 2, 3, 5, 6, 7, 8]].permute(0, 3, 2, 1).flatten(0, 1)
    want = attention(f.reshape(-1, 1, features), around, around, need_weights=False)[0].view_as(f)

    projections = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3))
    query, key, value = (functional.linear(x, *projection) for x, projection in zip((f, n, n), projections))
    _, pad_key, pad_value = attention.in_proj_bias.chunk(3)
    core = neighbor_attention(query, key, value, grid, heads, pad_key=pad_key, pad_value=pad_value)
    got = functional.linear(core, attention.out_proj.weight, attention.out_proj.bias)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)

    want_gradients = torch.autograd.grad(want.square().sum(), list(attention.parameters()))
    got_gradients = torch.autograd.grad(got.square().sum(), list(attention.parameters()))
    torch.testing.assert_close(got_gradients, want_gradients, rtol=1e-10, atol=1e-10)


def test_location_sees_its_eight_neighbors_and_not_itself():
    index = neighbor_index((3, 4))
    assert index[5].tolist() == [0, 1, 2, 4, 6, 8, 9, 10]
    assert index[0].tolist() == [12, 12, 12, 12, 1, 12, 4, 5]
    assert not (index == torch.arange(12)[:, None]).any()


@pytest.mark.parametrize("pads", [False, True])
def test_single_location_gives_zeros_or_the_pad_value(pads):
    query, key, value, pad_key, pad_value = inputs(2, (1, 1), 8, pads=pads)
    out = neighbor_attention(query, key, value, (1, 1), 2, pad_key=pad_key, pad_value=pad_value)
    want = pad_value.expand_as(out) if pads else torch.zeros_like(out)
    torch.testing.assert_close(out, want)
    out.sum().backward()
    for x in (query, key, value):
        torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_16_bit_inputs_are_computed_in_float32_also_under_autocast(dtype):
    query, key, value, pad_key, pad_value = (x.detach() for x in inputs(2, (3, 3), 8, pads=True, dtype=dtype))
    call = {"grid": (3, 3), "heads": 2}
    wide = neighbor_attention(
        query.double(), key.double(), value.double(), pad_key=pad_key.double(), pad_value=pad_value.double(), **call
    )
    got = neighbor_attention(query, key, value, pad_key=pad_key.float(), pad_value=pad_value.float(), **call)
    assert got.dtype == dtype
    half_ulp = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(got.double(), wide, rtol=1.01 * half_ulp + 2e-6, atol=2e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = neighbor_attention(query, key, value, pad_key=pad_key.float(), pad_value=pad_value.float(), **call)
    assert torch.equal(got, again)


def test_views_equal_their_copies():
    packed = draw(2, 6, 3 * 8)
    query, key, value = packed.chunk(3, dim=-1)
    turned = draw(8, 6, 2).permute(2, 1, 0)
    got = neighbor_attention(query, turned, value, (2, 3), 2)
    want = neighbor_attention(query.contiguous(), turned.contiguous(), value.contiguous(), (2, 3), 2)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    assert key.shape == query.shape


def test_image_alone_equals_image_in_a_batch():
    query, key, value, _, _ = (None if x is None else x.detach() for x in inputs(5, (3, 3), 8, pads=False))
    together = neighbor_attention(query, key, value, (3, 3), 2)
    alone = neighbor_attention(query[2:3], key[2:3], value[2:3], (3, 3), 2)
    torch.testing.assert_close(together[2:3], alone, rtol=1e-13, atol=1e-13)
    assert neighbor_attention(query[:0], key[:0], value[:0], (3, 3), 2).shape == (0, 9, 8)


@pytest.mark.parametrize("grid", [[2, 3], torch.Size([2, 3]), np.array([2, 3])], ids=["list", "Size", "array"])
def test_grid_of_any_sequence_of_integers_equals_tuple(grid):
    query = draw(2, 6, 8)
    want = neighbor_attention(query, query, query, (2, 3), 2)
    assert neighbor_attention(query, query, query, grid, np.int64(2)).equal(want)


class CountKernels(TorchDispatchMode):
    """Count the ATen operations that run."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count = getattr(self, "count", 0) + 1
        return func(*args, **(kwargs or {}))


def test_neighbor_index_is_made_once_for_a_grid_and_device(monkeypatch):
    monkeypatch.setattr(reference, "_stored", {})
    query = draw(2, 6, 8)
    counts = []
    for _ in range(2):
        with CountKernels() as mode:
            neighbor_attention(query, query, query, (2, 3), 2)
        counts.append(mode.count)
    assert counts[1] < counts[0] / 2
    neighbor_attention(query, query, query, (3, 2), 2)
    neighbor_attention(query, query, query, (3, 2), 2, dilation=2)
    at = query.device
    assert set(reference._stored) == {
        ((2, 3), NEIGHBORS, at),
        ((3, 2), NEIGHBORS, at),
        ((3, 2), window_of(dilation=2), at),
    }


@pytest.mark.parametrize(
    "first_call",
    [
        lambda call, x: torch.inference_mode()(call)(x),
        lambda call, x: torch.func.grad(lambda x: call(x).sum())(x),
        lambda call, x: torch.compile(call, fullgraph=True, backend="eager")(x),
        lambda call, x: torch.export.export(Call(call), (x,)),
        lambda call, x: on_fake(call, x),
    ],
    ids=["inference mode", "torch.func", "compile", "export", "fake tensors"],
)
def test_first_call_in_any_mode_leaves_a_usable_index(monkeypatch, first_call):
    monkeypatch.setattr(reference, "_stored", {})
    torch._dynamo.reset()
    query = draw(2, 6, 8)

    def call(x):
        return neighbor_attention(x, x, x, (2, 3), 2)

    first_call(call, query)
    got = query.clone().requires_grad_()
    call(got).square().sum().backward()
    monkeypatch.setattr(reference, "_stored", {})
    want = query.clone().requires_grad_()
    call(want).square().sum().backward()
    assert got.grad.equal(want.grad)


def test_fake_tensors_and_exports_after_a_stored_index_work():
    query = draw(2, 6, 8)

    def call(x):
        return neighbor_attention(x, x, x, (2, 3), 2)

    want = call(query)
    assert on_fake(call, query).shape == want.shape
    assert torch.export.export(Call(call), (query,)).module()(query).equal(want)


def on_fake(call, x):
    with FakeTensorMode() as mode:
        return call(mode.from_tensor(x))


class Call(nn.Module):
    """A function as a module, for export."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


GOOD = {"query": draw(2, 6, 8), "key": draw(2, 6, 8), "value": draw(2, 6, 8), "grid": (2, 3), "heads": 2}


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"query": [1.0]}, TypeError, r"query must be a tensor of shape \[B, L, D\], got list"),
        ({"query": draw(2, 6, 8).long()}, TypeError, r"query must be a floating-point tensor .* got torch.int64"),
        ({"query": draw(6, 8)}, ValueError, r"query must have shape \[B, L, D\], got \[6, 8\]"),
        ({"key": draw(2, 5, 8)}, ValueError, r"key must have shape \[2, 6, 8\], got \[2, 5, 8\]"),
        ({"value": draw(1, 6, 8)}, ValueError, r"value must have shape \[2, 6, 8\], got \[1, 6, 8\]"),
        ({"key": draw(2, 6, 8).float()}, TypeError, r"key must have the query's dtype .*64, got torch.float32"),
        ({"value": draw(2, 6, 8).half()}, TypeError, r"value must have the query's dtype .* got torch.float16"),
        ({"key": draw(2, 6, 8).to("meta")}, ValueError, r"key must be on cpu like the query, got meta"),
        ({"grid": (2, 2)}, ValueError, r"grid must be \(rows, columns\) of 6 locations, got \(2, 2\)"),
        ({"grid": (-2, -3)}, ValueError, r"grid must be \(rows, columns\) of 6 locations, got \(-2, -3\)"),
        ({"grid": (6,)}, ValueError, r"grid must be \(rows, columns\) of 6 locations, got \(6,\)"),
        ({"grid": 4}, TypeError, r"grid must be \(rows, columns\) of 6 locations, two integers, got 4"),
        ({"grid": (2.0, 3)}, TypeError, r"grid must be .* two integers, got \(2.0, 3\)"),
        ({"grid": "23"}, TypeError, r"grid must be .* two integers, got '23'"),
        ({"heads": 2.0}, TypeError, r"heads must be an integer of at least 1, got 2.0"),
        ({"heads": True}, TypeError, r"heads must be an integer of at least 1, got True"),
        ({"pad_key": 0.0, "pad_value": draw(8)}, TypeError, r"pad_key must be a tensor of shape \[8\], got float"),
        ({"heads": 3}, ValueError, r"heads must divide the 8 features, got 3"),
        ({"heads": 0}, ValueError, r"heads must be an integer of at least 1, got 0"),
        ({"pad_key": draw(8)}, ValueError, r"pad_key and pad_value must be given together"),
        ({"pad_value": draw(8)}, ValueError, r"pad_key and pad_value must be given together"),
        ({"pad_key": draw(7), "pad_value": draw(8)}, ValueError, r"pad_key must have shape \[8\], got \[7\]"),
        ({"pad_key": draw(8), "pad_value": draw(1, 8)}, ValueError, r"pad_value must have shape \[8\], got \[1, 8\]"),
        ({"kernel_size": 4}, ValueError, r"kernel_size must be odd, .* got 4"),
        ({"kernel_size": (3, 2)}, ValueError, r"kernel_size must be odd, .* got \(3, 2\)"),
        (
            {"kernel_size": (3, 3, 3)},
            ValueError,
            r"kernel_size must be an integer or \(rows, columns\), got \(3, 3, 3\)",
        ),
        ({"kernel_size": 3.0}, TypeError, r"kernel_size must be an integer of at least 1, got 3.0"),
        ({"kernel_size": 1}, ValueError, r"kernel_size 1 leaves a location without any key; use include_center=True"),
        ({"dilation": 0}, ValueError, r"dilation must be an integer of at least 1, got 0"),
        ({"dilation": True}, TypeError, r"dilation must be an integer of at least 1, got True"),
        ({"include_center": 1}, TypeError, r"include_center must be True or False, got 1"),
        (
            {"key_mask": draw(2, 6)},
            TypeError,
            r"key_mask must be a boolean tensor, got torch.float64",
        ),
        ({"key_mask": [True]}, TypeError, r"key_mask must be a tensor of shape \[2, 6\], got list"),
        ({"key_mask": draw(2, 5) > 0}, ValueError, r"key_mask must have shape \[2, 6\], got \[2, 5\]"),
        ({"key_mask": (draw(2, 6) > 0).to("meta")}, ValueError, r"key_mask must be on cpu like the query, got meta"),
        ({"value": None}, ValueError, r"key must have shape \[2, 6, 16\], got \[2, 6, 8\]"),
        (
            {"key": draw(2, 6, 16), "value": None, "pad_value": draw(8)},
            ValueError,
            r"pad_value must be None where value",
        ),
        ({"key": draw(2, 6, 16), "value": None, "pad_key": draw(8)}, ValueError, r"pad_key must have shape \[16\]"),
        ({"backend": "cuda"}, ValueError, r"backend must be one of 'auto', 'triton', 'torch', got 'cuda'"),
    ],
)
def test_wrong_argument_raises_one_sentence(change, kind, message):
    with pytest.raises(kind, match=message):
        neighbor_attention(**{**GOOD, **change})

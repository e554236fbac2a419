"""The compiled kernels against references in float64, over repeats and over batch sizes.

With compute-sanitizer: `-k every_kernel`, which launches all of them once on odd sizes.
"""

import itertools
import sys

import attention_cases as attention
import memory_cases as memory
import norm_cases as norm
import pytest
import torch
from harness import DEVICE

from simsid.kernels import neighbor_attention, residual_layer_norm, space_aware_memory
from simsid.kernels.launch import record_launches

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
ODD = (3, 5, 37, 203) if DEVICE.type == "cuda" else (2, 2, 9, 20)  # B, L, N, D that no block divides
SHAPES = {
    "B": (16, 16, 100, 8192),
    "A": (16, 16, 100, 512),
    "S": (16, 4, 200, 2048),
    "Q": (1, 16, 100, 512),
    "C": (256, 16, 500, 2048),
}
BATCHES = (1, 16, 17, 32, 33, 64, 256)  # both sides of every change of tile
SMALL_BATCHES = (1, 16, 17)


def names(dtypes):
    return "-".join(str(dtype)[6:] for dtype in dtypes)


def draw_with_gap(shape, k, dtypes=memory.PAIRS[0], exclusive=False, similarity="dot", **options):
    """Draw inputs whose top-k set no rounding can change: the selection is discontinuous."""
    for seed in range(50):
        z, M, g, noise = memory.draw(*shape, *dtypes, seed=seed, **options)
        if memory.gap(z, M, k, noise, 1.0, exclusive, similarity) > 2e-5:
            return z, M, g, noise
    raise AssertionError(f"no seed gives a gap at the {k}-th of {shape[2]} items")


def memory_results(z, M, g, k=5):
    """Return the output and both gradients of the fused memory."""
    return list(memory.gradients(lambda z, M: space_aware_memory(z, M, k, backend="triton"), z, M, g).values())


# Against the references ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_memory_float32_matches_float64(shape, small, full_precision):
    z, M, g, _ = draw_with_gap(ODD if small else SHAPES[shape], 5)
    memory.compare(z, M, g, 5)


@pytest.mark.parametrize("dtypes", memory.PAIRS[1:], ids=names)
@pytest.mark.parametrize("batch", [16, 32, 64], ids=lambda batch: f"batch{batch}")
def test_memory_16_bit_matches_float64(dtypes, batch, small, full_precision):
    """16 and 32 queries take the joint gradient kernel, 64 the separate ones."""
    shape = (3, *ODD[1:]) if small else (batch, *SHAPES["A"][1:])
    z, M, g, _ = draw_with_gap(shape, 5, dtypes)
    memory.compare(z, M, g, 5)


OPTIONS = {
    "exclusive": {"threshold": "exclusive"},
    "noise": {"noisy": True},
    "k is 1": {"k": 1},
    "k is N": {"k": 64},
    "shared items": {"shared": True},
    "batch 33": {"batch": 33},
    "cosine": {"similarity": "cosine"},
    "cosine, batch 33": {"similarity": "cosine", "batch": 33},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_memory_options_match_float64(option, small, full_precision):
    choice = dict(OPTIONS[option])
    k, threshold, batch = choice.pop("k", 5), choice.pop("threshold", "inclusive"), choice.pop("batch", ODD[0])
    shape = (batch, *ODD[1:])
    z, M, g, noise = draw_with_gap(shape, min(k, shape[2]), exclusive=threshold == "exclusive", **choice)
    memory.compare(z, M, g, k, noise, threshold, similarity=choice.get("similarity", "dot"))


@pytest.mark.parametrize("batch", [3, 33], ids=lambda batch: f"batch{batch}")
def test_masked_items_of_the_memory_match_float64(batch, small, full_precision):
    z, M, g, _ = memory.draw(min(batch, 3) if small else batch, *ODD[1:])
    mask = torch.zeros(M.shape[:2], dtype=torch.bool, device=M.device)
    mask[:, ::9] = True  # no more than are kept, so that no rounding changes the selection
    memory.compare(z, torch.where(mask[..., None], M, torch.nan), g, 5, item_mask=mask)


def test_memory_of_more_items_than_one_tile_matches_float64(small, full_precision):
    z, M, g, _ = draw_with_gap((2, 1, 4200 if small else 5000, 24), 5)
    memory.compare(z, M, g, 5)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["query alone", "items alone"])
@pytest.mark.parametrize("batch", [16, 64], ids=lambda batch: f"batch{batch}")
def test_memory_gradient_alone_is_that_of_both(needs, batch, small, full_precision):
    z, M, g, _ = draw_with_gap((3, *ODD[1:]) if small else (batch, *SHAPES["A"][1:]), 5)
    both = memory_results(z, M, g)[1:]
    z, M = z.detach().requires_grad_(needs[0]), M.detach().requires_grad_(needs[1])
    wanted = [tensor for tensor, need in zip((z, M), needs) if need]
    (alone,) = torch.autograd.grad(space_aware_memory(z, M, 5, backend="triton"), wanted, g)
    (together,) = (gradient for gradient, need in zip(both, needs) if need)
    assert (alone - together).abs().max() <= 1e-5 * together.abs().max()


GRIDS = {"4x4": ((4, 4), 512, 8), "2x2": ((2, 2), 2048, 8), "3x3": ((3, 3), 256, 8), "8x8": ((8, 8), 512, 8)}
GRIDS |= {"16x16": ((16, 16), 512, 8), "3x5 odd width": ((3, 5), 35, 5)}
FLOATS = (FLOAT32, BFLOAT16, FLOAT16)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("pads", [True, False], ids=["pads", "no pads"])
@pytest.mark.parametrize("grid", GRIDS)
def test_attention_matches_float64(grid, pads, dtype, small, full_precision):
    size, features, heads = ((2, 2), 8, 2) if small else GRIDS[grid]
    attention.assert_fused_is_right(attention.inputs(2, size, features, pads=pads, dtype=dtype), size, heads)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("options", [{"include_center": True}, {"dilation": 2}, {"kernel_size": (1, 9)}], ids=str)
def test_attention_windows_and_masks_match_float64(options, dtype, small, full_precision):
    size, features, heads = ((2, 2), 8, 2) if small else GRIDS["16x16"]
    mask = attention.draw(2, size[0] * size[1], seed=8) > 0
    attention.assert_fused_is_right(attention.inputs(2, size, features, dtype=dtype), size, heads, mask, **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", [(256, 512), (64, 2048), (300, 8192), (7, 35)], ids=str)
def test_layer_norm_matches_float64(shape, dtype, small, full_precision):
    norm.assert_fused_is_right(norm.inputs((3, 16) if small else shape, dtype))


# The same bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", memory.PAIRS, ids=names)
@pytest.mark.parametrize("shape", ["A", "B", "odd"])
def test_memory_repeats_bit_for_bit(shape, dtypes, small):
    z, M, g, _ = memory.draw(*(ODD if small or shape == "odd" else SHAPES[shape]), *dtypes)
    first = memory_results(z, M, g)
    for _ in range(1 if small else 20):
        assert all(map(torch.equal, memory_results(z, M, g), first))


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_attention_and_layer_norm_repeat_bit_for_bit(dtype, small):
    grid, features, heads = ((2, 2), 8, 2) if small else GRIDS["4x4"]
    tensors, g = attention.inputs(16, grid, features, dtype=dtype), attention.draw(16, grid[0] * grid[1], features)
    rows, h = norm.inputs((3, 16) if small else (300, 2048), dtype), norm.draw(*((3, 16) if small else (300, 2048)))
    first = [attention.run(tensors, grid, heads, g), norm.run(rows, h)]
    for _ in range(1 if small else 20):
        for results, again in zip(first, (attention.run(tensors, grid, heads, g), norm.run(rows, h)), strict=True):
            assert all(torch.equal(results[name], again[name]) for name in results)


@pytest.mark.parametrize("dtypes", memory.PAIRS, ids=names)
@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: f"batch{batch}")
def test_memory_output_does_not_depend_on_the_batch(batch, dtypes, small):
    if small and batch not in SMALL_BATCHES:
        pytest.skip("too large for the interpreter")
    total = 18 if small else 256
    z, M, _, _ = memory.draw(total, *((1, 9, 20) if small else SHAPES["A"][1:]), *dtypes)
    together = space_aware_memory(z, M, 5, backend="triton")
    for start in range(0, total - batch + 1, max(batch, total // 4)):
        part = slice(start, start + batch)
        alone = space_aware_memory(z[part], M, 5, backend="triton")
        # NumPy, which multiplies in the interpreter, sums in another order for another size.
        assert torch.allclose(alone, together[part], atol=1e-6) if small else alone.equal(together[part])


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: f"batch{batch}")
def test_attention_and_layer_norm_do_not_depend_on_the_batch(batch, dtype, small):
    if small and batch not in SMALL_BATCHES:
        pytest.skip("too large for the interpreter")
    total, (grid, features, heads) = (18, ((2, 2), 8, 2)) if small else (256, GRIDS["4x4"])
    tensors = attention.inputs(total, grid, features, dtype=dtype)
    g = attention.draw(total, grid[0] * grid[1], features, dtype=dtype, seed=9)
    rows, h = norm.inputs((total, features), dtype), norm.draw(total, features, dtype=dtype, seed=9)
    together = attention.run(tensors, grid, heads, g), norm.run(rows, h)
    part = {name: x[:batch] if x.dim() == 3 else x for name, x in tensors.items()}
    some = {name: x[:batch] if x.dim() == 2 else x for name, x in rows.items()}
    alone = attention.run(part, grid, heads, g[:batch]), norm.run(some, h[:batch])
    for mine, all_rows, per_image in zip(alone, together, ({"out", "query", "key", "value"}, {"out", "x", "residual"})):
        for name in per_image:
            assert mine[name].equal(all_rows[name][:batch]), name


@pytest.mark.parametrize("dtypes", memory.PAIRS[1:], ids=names)
@pytest.mark.parametrize("batch", [16, 64], ids=lambda batch: f"batch{batch}")
def test_memory_16_bit_soak(batch, dtypes, small, full_precision):
    """Hundreds of launches beside other work give the same, correct bits.

    A missing fence between an asynchronous copy and a warp-group product (sm_90, Triton 3.6, 16-bit operands) would
    show as a rare wrong tile.
    """
    z, M, g, _ = draw_with_gap((3, *ODD[1:]) if small else (batch, *SHAPES["A"][1:]), 5, dtypes)
    first = list(memory.compare(z, M, g, 5).values())
    noise = torch.randn(16 if small else 4096, 16 if small else 4096, device=DEVICE)
    different = 0
    for number in range(2 if small else 400):
        if number % 3 == 0:
            noise = (noise @ noise).clamp(-1, 1)  # evicts the L2 cache and shifts when programs start
        different += not all(map(torch.equal, memory_results(z, M, g), first))
    assert not different


# Every kernel -------------------------------------------------------------------------------------------------------


def kernel_names():
    """Return the names of all kernels that simsid.kernels defines."""
    found = set()
    for name, module in list(sys.modules.items()):
        if name.startswith("simsid.kernels."):
            found |= {attribute for attribute, value in vars(module).items() if hasattr(value, "fn")}
    return {name for name in found if name.endswith("_kernel")}


def test_every_kernel_runs_on_odd_sizes(small):
    """No reference and no repeat, so that compute-sanitizer finishes in minutes."""
    with record_launches() as launches:
        for dtypes, batch in itertools.product(memory.PAIRS, (ODD[0], 3 if small else 33)):
            z, M, g, _ = memory.draw(batch, *ODD[1:], *dtypes)
            results = memory_results(z, M, g)
            results += torch.autograd.grad(space_aware_memory(z.requires_grad_(), M, 5, backend="triton"), z, g)
            results += torch.autograd.grad(
                space_aware_memory(z.detach(), M.requires_grad_(), 5, backend="triton"), M, g
            )
            out = space_aware_memory(z, M, 5, similarity="cosine", backend="triton")
            results += [out, *torch.autograd.grad(out, (z, M), g)]
            assert all(tensor.isfinite().all() for tensor in results)
        for dtype, pads in itertools.product(FLOATS, (True, False)):
            tensors = attention.inputs(2, (3, 5), 35, pads=pads, dtype=dtype)
            results = attention.run(tensors, (3, 5), 5, attention.draw(2, 15, 35))
            results |= {
                f"norm {name}": x for name, x in norm.run(norm.inputs((7, 35), dtype), norm.draw(7, 35)).items()
            }
            assert all(tensor.isfinite().all() for tensor in results.values())
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    names = {getattr(launched.kernel, "fn", launched.kernel).__name__ for launched in launches}
    assert kernel_names() == names and len(names) >= 8


@pytest.mark.parametrize("op", ["memory", "attention", "layer norm"])
def test_auto_takes_the_kernel_on_cuda_alone(op, device):
    with record_launches() as launches:
        if op == "memory":
            z, M, _, _ = memory.draw(2, 1, 9, 20)
            space_aware_memory(z, M, 3)
        elif op == "attention":
            neighbor_attention(grid=(2, 2), heads=2, **attention.inputs(1, (2, 2), 8))
        else:
            residual_layer_norm(**norm.inputs((3, 16)))
    assert bool(launches) == (device.type == "cuda")

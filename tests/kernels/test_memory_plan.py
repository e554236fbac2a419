"""The launch plans of the memory, and what the compiler makes of the variants that they choose."""

import itertools

import pytest
import torch
from harness import compile_every_variant, needs_compiler

from simsid.kernels.memory import plan

SIZES = list(itertools.product((1, 4, 16, 64), (1, 7, 64, 100, 500, 5000), (1, 16, 33, 128, 203, 512, 2048, 8192)))


@pytest.mark.parametrize(("L", "N", "D"), SIZES)
def test_splits_cover_features_once_and_do_not_depend_on_the_batch(L, N, D):
    for warp_groups in (True, False):
        plans = [plan.plan_scores(B, L, N, D, warp_groups) for B in (1, 2, 16, 17, 64, 1000)]
        assert len({(each.chunk, each.splits, each.block_n, each.block_d) for each in plans}) == 1
    chosen = plans[0]
    assert chosen.splits == plan.plan_scores(1, L, N, D, True).splits
    assert (chosen.splits - 1) * chosen.chunk < D <= chosen.splits * chosen.chunk
    assert chosen.chunk % chosen.block_d == 0
    assert chosen.splits <= 32


@pytest.mark.parametrize("warp_groups", [True, False])
@pytest.mark.parametrize("B", [1, 15, 16, 17, 32, 33, 64, 65, 4096])
def test_tiles_are_powers_of_two_of_at_least_16(B, warp_groups):
    plans = [plan.plan_query_gradient(B, warp_groups), plan.plan_items_gradient(B, warp_groups)]
    joint = plan.plan_joint_gradient(B)
    for each in [plan.plan_scores(B, 16, 100, 512, warp_groups), *plans, *([joint] if joint else [])]:
        for size in (each.block_b, each.block_n, each.block_d):
            assert size >= 16 and size & (size - 1) == 0
    assert (joint is None) == (B > plan.JOINT_BATCH)
    assert joint is None or joint.block_b >= B


@pytest.mark.parametrize("N", [1, 15, 100, 4096, 4097, 100_000])
@pytest.mark.parametrize("k", [1, 5, 64])
@pytest.mark.parametrize("D", [1, 512, 8192])
def test_row_fits_its_program(N, k, D):
    rows = plan.plan_rows(N, D, min(k, N))
    assert (rows.tiles - 1) * rows.block_n < N <= rows.tiles * rows.block_n
    assert rows.block_n <= plan.MAX_TILE_ITEMS and rows.block_k >= min(k, N)
    assert rows.block_k * rows.block_d <= 8192
    assert rows.blocks == 1 or rows.block_d * (rows.blocks - 1) < D


def test_refusal_names_its_reason():
    float32, bfloat16, float64 = torch.float32, torch.bfloat16, torch.float64
    assert plan.refuse(float32, float32, 16, 100, 5) is None
    assert plan.refuse(bfloat16, float32, 16, 100, 5) is None
    assert plan.refuse(bfloat16, bfloat16, 16, 50, 100) is None
    assert "float64" in plan.refuse(float64, float64, 16, 100, 5)
    assert "memory of torch.bfloat16" in plan.refuse(float32, bfloat16, 16, 100, 5)
    assert "65 kept" in plan.refuse(float32, float32, 16, 100, 65)
    assert "70000 locations" in plan.refuse(float32, float32, 70_000, 100, 5)


@needs_compiler
def test_products_run_on_tensor_cores():
    for report in compile_every_variant("memory"):
        kernel, _, case = report["name"].partition(" ")
        products = report["hgmma"] + report["hmma"] + report["utcmma"]
        if "scores" in kernel and report["arch"] != 80 and "tiny" not in case:
            # Items are the rows: instructions of a whole warp group, in every dtype and for every batch.
            assert report["hmma"] == 0 and report["hgmma" if report["arch"] == 90 else "utcmma"] > 0, report
        assert (products > 0) == (not any(name in kernel for name in ("select", "softmax", "cosine"))), report


@needs_compiler
def test_memory_is_read_16_bytes_at_a_time():
    for report in compile_every_variant("memory"):
        if not any(word in report["name"] for word in ("softmax", "memory_cosine_kernel", "odd", "tiny")):
            assert report["wide"] > 0, report

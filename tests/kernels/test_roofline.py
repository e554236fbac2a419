"""The counted cost of the ops, and its number of launches against those of the host code."""

import sys

import pytest
import torch
from harness import ROOT, needs_compiler

from simsid.kernels.attention.reference import neighbor_index
from simsid.kernels.launch import record_launches

sys.path.insert(0, str(ROOT / "benchmarks"))

import roofline

SHAPES = {
    "A": (16, 16, 100, 512),
    "B": (16, 16, 100, 8192),
    "C": (256, 16, 500, 2048),
    "S": (16, 4, 200, 2048),
    "Q": (1, 16, 100, 512),
}


@pytest.mark.parametrize(
    ("shape", "forward", "backward"), [("A", 4.4e6, 8.2e6), ("B", 69e6, 130e6), ("C", 141e6, 240e6)]
)
def test_memory_bytes_match_hand_count(shape, forward, backward):
    assert roofline.space_aware_memory_forward(*SHAPES[shape]).bytes == pytest.approx(forward, rel=0.02)
    assert roofline.space_aware_memory_backward(*SHAPES[shape]).bytes == pytest.approx(backward, rel=0.02)


def test_floor_is_the_slower_of_bytes_and_arithmetic():
    forward = roofline.space_aware_memory_forward(*SHAPES["B"])
    assert forward.floor(3e12, 60e12) == pytest.approx(23e-6, rel=0.02)
    assert roofline.space_aware_memory_forward(*SHAPES["C"]).floor(3e12, 60e12) == pytest.approx(141e-6, rel=0.02)
    assert (forward + forward).floor(3e12, 60e12) == pytest.approx(2 * forward.floor(3e12, 60e12))


def test_gradient_that_is_not_needed_costs_nothing():
    full = roofline.space_aware_memory_backward(2, 3, 10, 8)
    queue = roofline.space_aware_memory_backward(2, 3, 10, 8, need_memory=False)
    assert full.bytes - queue.bytes == 4 * (3 * 10 * 8 + 2 * 3 * 8)
    assert full.flops - queue.flops == 2 * (2 * 3 * 10 * 8 + 5 * 2 * 3 * 8)
    inference = roofline.space_aware_memory_forward(2, 3, 10, 8, save=False)
    assert roofline.space_aware_memory_forward(2, 3, 10, 8).bytes - inference.bytes == 4 * 2 * 3 * 10
    shared = roofline.space_aware_memory_forward(2, 3, 10, 8, shared=True, save=False)
    assert inference.bytes - shared.bytes == 4 * 2 * 10 * 8


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (2, 2), (3, 4), (8, 8)])
def test_attention_operations_match_pairs_of_neighbors(grid):
    pairs = int((neighbor_index(grid) < grid[0] * grid[1]).sum())
    assert roofline.neighbor_attention_forward(1, grid, 1).flops == 4 * pairs
    assert roofline.neighbor_attention_backward(1, grid, 1).flops == 10 * pairs


@needs_compiler
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared", [False, True])
def test_memory_launches_match_host_code(shape, needs, shared):
    from simsid.kernels.memory.launchers import memory_backward, memory_forward

    B, L, N, D = SHAPES[shape]
    z, M = torch.empty(B, L, D, device="meta"), torch.empty(1 if shared else L, N, D, device="meta")
    with record_launches(run=False) as forward:
        _, p = memory_forward(z, M, None, None, 5, False, False, 1.0, True, False)
    with record_launches(run=False) as backward:
        memory_backward(z, z, M, None, [p], 1.0, *needs)
    assert len(forward) == roofline.space_aware_memory_forward(B, L, N, D, shared=shared).launches
    options = {"shared": shared, "need_query": needs[0], "need_memory": needs[1]}
    assert len(backward) == roofline.space_aware_memory_backward(B, L, N, D, **options).launches


@needs_compiler
def test_attention_launches_match_host_code():
    from simsid.kernels.attention.variants import cases

    for name, call, _ in cases():
        with record_launches(run=False) as launches:
            call()
        if name.startswith("forward"):
            counted = roofline.neighbor_attention_forward(1, (4, 4), 8)
        else:
            counted = roofline.neighbor_attention_backward(1, (4, 4), 8, pads="pads" in name)
        assert len(launches) == counted.launches, name

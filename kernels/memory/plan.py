"""Launch plans of the space-aware memory: pure functions from sizes to tiles, with the reason beside each entry."""

import dataclasses

import torch

from simsid.kernels.launch import ceil_div, power_of_two

MAX_TILE_ITEMS = 4096  # a row of int64 keys in the registers of 8 warps; longer rows are read tile after tile
MAX_KEPT = 64  # each kept item costs a pass over the row's keys; above it a dense product with p is the better plan
MAX_LOCATIONS = 65535  # the second axis of a launch grid
JOINT_BATCH = 32  # up to here one program holds all queries of its location, so dz and dM share one reading of M
QUERY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuse(query: torch.dtype, memory: torch.dtype, locations: int, items: int, topk: int) -> str | None:
    """Return why the kernels do not take these arguments, or None."""
    if query not in QUERY_DTYPES:
        return f"a query of {query} has no kernel"
    if memory not in (query, torch.float32):
        return f"a memory of {memory} with a query of {query} has no kernel"
    if locations > MAX_LOCATIONS:
        return f"{locations} locations are more than a launch's {MAX_LOCATIONS}"
    if min(topk, items) > MAX_KEPT:
        return f"{min(topk, items)} kept items are more than the kernel's {MAX_KEPT}"
    return None


@dataclasses.dataclass(frozen=True)
class ScorePlan:
    """Tiles of `s = z M`: `splits` programs divide the features of one product, `chunk` each."""

    block_n: int
    block_b: int
    block_d: int
    chunk: int
    splits: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Tiles of the kernels that hold one row of N probabilities."""

    block_n: int
    tiles: int
    block_k: int
    block_d: int
    blocks: int  # of features, one after the other in a program
    num_warps: int


@dataclasses.dataclass(frozen=True)
class GradientPlan:
    """Tiles of a kernel that makes dz, dM, or both."""

    block_b: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


def plan_scores(
    batch: int, locations: int, items: int, features: int, warp_groups: bool, squares: bool = False
) -> ScorePlan:
    """Plan the score kernel; whatever decides the order of summation depends on the memory's shape alone.

    Args:
        batch: B.
        locations: L.
        items: N.
        features: D.
        warp_groups: a whole warp group multiplies (sm_90, sm_100), out of shared memory. Single warps multiply out of
            registers: 64 features a step take 252 of them with 32 queries, and spill with 64.
        squares: the squares of both sides are added up too, which spills with 64 queries.
    """
    block_n = 64  # the M side of a warp-group MMA; dividing the items does not read M twice
    step = min(64, max(16, power_of_two(features)))
    programs = locations * ceil_div(items, block_n)
    # Two programs for each of about 130 multiprocessors, from the memory alone; 128 features amortize a program's
    # start, and the next kernel should not read more than 32 partial sums.
    splits = min(power_of_two(ceil_div(256, programs)), 32, ceil_div(features, 128))
    chunk = ceil_div(ceil_div(features, splits), step) * step
    # Each tile of queries reads all of M again, from the L2 cache at best.
    block_b = min(32 if squares else 64, max(16, power_of_two(batch)))
    block_d = step if warp_groups else min(32, step)
    return ScorePlan(block_n, block_b, block_d, chunk, ceil_div(features, chunk), num_warps=4, num_stages=3)


def plan_rows(items: int, features: int, kept: int) -> RowPlan:
    """Plan the kernels whose program owns one row of N items; each program of a row repeats the selection."""
    block_n = min(MAX_TILE_ITEMS, max(16, power_of_two(items)))
    block_k = power_of_two(kept)
    # 8192 gathered numbers are 64 registers a thread; wide blocks repeat the selection less often.
    block_d = min(max(16, power_of_two(features)), 1024, 8192 // block_k)
    # A kept item costs about 35 instructions in every program, a block of features 240: as much for both.
    blocks = min(ceil_div(features, block_d), max(1, kept // 8))
    tiles = ceil_div(items, block_n)
    num_warps = 4 if max(block_n, block_d) <= 1024 else 8  # at most 8 keys a thread up to there
    if tiles > 1:
        num_warps = 16  # with 8, which 4096 items in one tile suit, two values spill on sm_90
    return RowPlan(block_n, tiles, block_k, block_d, blocks, num_warps)


def plan_joint_gradient(batch: int) -> GradientPlan | None:
    """Plan the kernel that makes dz and dM in one pass over M, or None where its queries do not fit one program."""
    if batch > JOINT_BATCH:
        return None
    # Meant to be bound by bandwidth (an H200 reaches 42 % of it): small tiles, so that four programs fit a
    # multiprocessor (32 items need twice the registers, and spill for bf16 queries).
    if batch <= 16:
        return GradientPlan(block_b=16, block_n=16, block_d=64, num_warps=4, num_stages=3)
    # Tiles of half the size: one more of them in flight. (Three stages also spill for bf16 queries on sm_90.)
    return GradientPlan(block_b=32, block_n=16, block_d=32, num_warps=4, num_stages=4)


def plan_query_gradient(batch: int, warp_groups: bool) -> GradientPlan:
    """Plan the kernel that makes dz alone; 64 queries suit a warp group, and take all registers of single warps."""
    block_b = min(64 if warp_groups else 32, max(16, power_of_two(batch)))
    return GradientPlan(block_b, block_n=32, block_d=64, num_warps=4, num_stages=3)


def plan_items_gradient(batch: int, warp_groups: bool) -> GradientPlan:
    """Plan the kernel that makes dM alone, in tiles of queries; 64 items suit a warp group.

    With single warps, 32 queries a step spill.
    """
    block_b = min(32 if warp_groups else 16, max(16, power_of_two(batch)))
    return GradientPlan(block_b, block_n=64, block_d=64, num_warps=4, num_stages=2)

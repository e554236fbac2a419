"""Launch plans of neighbor attention: pure functions from sizes to tiles, with the reason beside each entry."""

import dataclasses

import torch

from simsid.kernels.launch import power_of_two

MAX_LOCATIONS = 256  # a program holds its grid's weights, 8 a location, in registers; larger grids run in PyTorch


def refuse(dtype: torch.dtype, locations: int) -> str | None:
    """Return why the kernels do not take these arguments, or None."""
    if dtype == torch.float64:
        return "float64 has no kernel"
    if locations > MAX_LOCATIONS:
        return f"{locations} locations are more than the {MAX_LOCATIONS} that one program can hold"
    return None


@dataclasses.dataclass(frozen=True)
class GridPlan:
    """Tile of the program that owns one head of one image."""

    block_l: int
    block_w: int
    num_warps: int


def plan_grid(locations: int, width: int, element_size: int) -> GridPlan:
    """Plan a grid of `locations`, heads of `width` features and elements of `element_size` bytes.

    One 16-byte access a thread must cover the tile of locations x features exactly, and one warp a location's row.
    Then the eight slots of a feature lie in one thread, sums over slots need no exchange and sums over features only
    shuffles; a tile smaller than that puts slots into other warps, and the forward kernel goes from no barrier to 36.
    """
    vector = 16 // element_size  # elements of one access
    block_l = power_of_two(locations)
    block_w = min(power_of_two(width), 32 * vector)  # at most the row that one warp covers
    # Eight warps leave 255 registers a thread, of which the backward kernel takes up to 210; with 16 warps it spills.
    num_warps = max(1, min(8, block_l, block_l * block_w // (32 * vector)))
    return GridPlan(block_l, min(block_w, max(1, 32 * vector * num_warps // block_l)), num_warps)

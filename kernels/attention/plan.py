"""Windows and launch plans of neighbor attention: pure functions from sizes to tiles, the reason beside each entry."""

import dataclasses
from typing import NamedTuple

import torch

from simsid.kernels.launch import power_of_two

MAX_LOCATIONS = 256  # a program holds its grid's weights, one a key, in registers; larger grids run in PyTorch
MAX_KEYS = 9  # of a window of 3x3; 10 to 16 keys spill on a grid of 16x16, and larger windows hold more still


class Window(NamedTuple):
    """The cells around a location whose keys it attends to; by default its eight neighbors."""

    rows: int = 3
    columns: int = 3
    row_step: int = 1
    column_step: int = 1
    center: bool = False

    @property
    def keys(self) -> int:
        """The number of cells that are keys."""
        return self.rows * self.columns - 1 + self.center


def refuse(dtype: torch.dtype, locations: int, window: Window) -> str | None:
    """Return why the kernels do not take these arguments, or None."""
    if dtype == torch.float64:
        return "float64 has no kernel"
    if locations > MAX_LOCATIONS:
        return f"{locations} locations are more than the {MAX_LOCATIONS} that one program can hold"
    if window.keys > MAX_KEYS:
        return f"{window.keys} keys in a window are more than the {MAX_KEYS} that one program can hold"
    return None


@dataclasses.dataclass(frozen=True)
class GridPlan:
    """Tile of the program that owns one head of one image."""

    slots: int
    block_l: int
    block_w: int
    num_warps: int


def plan_grid(locations: int, width: int, element_size: int, keys: int = 8) -> GridPlan:
    """Plan a grid of `locations`, heads of `width` features, elements of `element_size` bytes and windows of `keys`.

    One access a thread must cover the tile of locations x features exactly, and one warp a location's row. Then the
    slots of a feature lie in one thread, sums over slots need no exchange and sums over features only shuffles; a tile
    smaller than that puts slots into other warps, and the forward kernel goes from no barrier to 36.
    """
    slots = max(8, power_of_two(keys))
    # Elements of one access: 16 bytes, but with 16 slots of 16-bit elements a thread would hold 128 numbers, and spill.
    vector = min(16 // element_size, 64 // slots)
    block_l = power_of_two(locations)
    block_w = min(power_of_two(width), 32 * vector)  # at most the row that one warp covers
    # Eight warps leave 255 registers a thread, of which the backward kernel takes up to 210; with 16 warps it spills.
    num_warps = max(1, min(8, block_l, block_l * block_w // (32 * vector)))
    return GridPlan(slots, block_l, min(block_w, max(1, 32 * vector * num_warps // block_l)), num_warps)

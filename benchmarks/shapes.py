"""The shapes that every benchmark and table names by a letter."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Images, the grid of their locations, memory items per location, features of an item, attention heads."""

    images: int
    grid: tuple[int, int]
    items: int
    features: int
    heads: int = 8

    @property
    def locations(self) -> int:
        """The number of locations of the grid."""
        return self.grid[0] * self.grid[1]


# In the order in which they run: the shape that takes most of a training step comes first.
GPU = {
    "B": Shape(16, (4, 4), 100, 8192),  # first decoder memory of SimSID
    "A": Shape(16, (4, 4), 100, 512),  # in-painting memory of SimSID
    "S": Shape(16, (2, 2), 200, 2048),  # in-painting memory of SQUID
    "Q": Shape(1, (4, 4), 100, 512),  # A with a single image
    "C": Shape(256, (4, 4), 500, 2048),  # large
}

# The same proportions at sizes that a CPU finishes in seconds; figures from them say nothing about a GPU.
CPU = {
    "B": Shape(4, (4, 4), 50, 512),
    "A": Shape(4, (4, 4), 50, 128),
    "S": Shape(4, (2, 2), 100, 256),
    "Q": Shape(1, (4, 4), 50, 128),
    "C": Shape(16, (4, 4), 100, 256),
}


class Sizes(NamedTuple):
    """Width of the whole model, and images of a folder, of a training epoch and of an inference pass (None is all)."""

    width: int
    folder: int
    train: int | None
    test: int | None


MODEL = {"cuda": Sizes(32, 512, None, None), "cpu": Sizes(8, 32, 32, 32)}

"""The shapes that every benchmark and table speaks of, by letter."""

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
        return self.grid[0] * self.grid[1]


GPU = {
    "A": Shape(16, (4, 4), 100, 512),  # in-painting memory of SimSID
    "B": Shape(16, (4, 4), 100, 8192),  # its first decoder memory
    "C": Shape(256, (4, 4), 500, 2048),  # large
    "S": Shape(16, (2, 2), 200, 2048),  # SQUID
    "Q": Shape(1, (4, 4), 100, 512),  # one film
}

# The same proportions where a CPU finishes in seconds; figures from them say nothing about a GPU.
CPU = {
    "A": Shape(4, (4, 4), 50, 128),
    "B": Shape(4, (4, 4), 50, 512),
    "C": Shape(16, (4, 4), 100, 256),
    "S": Shape(4, (2, 2), 100, 256),
    "Q": Shape(1, (4, 4), 50, 128),
}


class Sizes(NamedTuple):
    """Of the whole model: its width, films of a folder and of an epoch's training and inference (None is all)."""

    width: int
    folder: int
    train: int | None
    test: int | None


MODEL = {"cuda": Sizes(32, 512, None, None), "cpu": Sizes(8, 32, 32, 32)}

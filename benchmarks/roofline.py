"""The least that the ops can cost: bytes that must move, arithmetic that must be done, and the time both take.

Bytes count every tensor once, however often a kernel reads it; arithmetic counts the products of the definition, a
multiplication and an addition as two. What a kernel does beyond that shows as its distance from here.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes, floating-point operations and kernel launches of one pass."""

    bytes: int
    flops: int
    launches: int

    def floor(self, bandwidth: float, arithmetic: float) -> float:
        """Return the seconds that a GPU of `bandwidth` bytes/s and `arithmetic` FLOP/s needs at least."""
        return max(self.bytes / bandwidth, self.flops / arithmetic)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops, self.launches + other.launches)


def space_aware_memory_forward(
    batch: int,
    locations: int,
    items: int,
    features: int,
    topk: int = 5,
    *,
    query_bytes: int = 4,
    memory_bytes: int = 4,
    shared: bool = False,
    save: bool = True,
) -> Cost:
    """Return the cost of one look-up; with `save`, the probabilities are kept in float32 for the backward."""
    rows, products = batch * locations, batch * locations * items * features
    memory = (1 if shared else locations) * items * features * memory_bytes
    kept = min(topk, items) * rows * features
    saved = 4 * rows * items if save else 0
    return Cost(memory + 2 * rows * features * query_bytes + saved, 2 * (products + kept), launches=2)


def space_aware_memory_backward(
    batch: int,
    locations: int,
    items: int,
    features: int,
    topk: int = 5,
    *,
    query_bytes: int = 4,
    memory_bytes: int = 4,
    shared: bool = False,
    need_query: bool = True,
    need_memory: bool = True,
) -> Cost:
    """Return the cost of the gradients: dw always, dz = ds M and dM = w' g + ds' z as they are needed."""
    rows, products = batch * locations, batch * locations * items * features
    memory = (1 if shared else locations) * items * features * memory_bytes
    vectors = rows * features * query_bytes  # one of g, z, dz
    moved = memory + vectors + 4 * rows * items
    flops = 2 * products
    launches = 2
    if need_query:
        moved, flops = moved + vectors, flops + 2 * products
    if need_memory:
        moved, flops = moved + vectors + memory, flops + 2 * (products + min(topk, items) * rows * features)
    joint = need_query and need_memory and (batch * locations if shared else batch) <= 32
    launches += 1 if joint else need_query + need_memory
    return Cost(moved, flops, launches)


def _neighbors(grid: tuple[int, int]) -> int:
    """Count the pairs of a location and one of its neighbors inside the grid."""
    rows, columns = grid
    straight = rows * (columns - 1) + columns * (rows - 1)
    diagonal = 2 * (rows - 1) * (columns - 1)
    return 2 * (straight + diagonal)


def neighbor_attention_forward(batch: int, grid: tuple[int, int], features: int, *, element_bytes: int = 4) -> Cost:
    """Return the cost of reading query, key and value and writing the output; two products a pair of neighbors."""
    tensor = batch * grid[0] * grid[1] * features * element_bytes
    return Cost(4 * tensor, 2 * 2 * batch * _neighbors(grid) * features, launches=1)


def neighbor_attention_backward(
    batch: int, grid: tuple[int, int], features: int, *, element_bytes: int = 4, pads: bool = False
) -> Cost:
    """Return the cost of the gradients of query, key and value: scores again, dP, dQ, dK and dV for each pair.

    The gradients of pads, whose few bytes do not count, are added in a launch of their own.
    """
    tensor = batch * grid[0] * grid[1] * features * element_bytes
    return Cost(7 * tensor, 5 * 2 * batch * _neighbors(grid) * features, launches=1 + pads)

"""What a memory holds and what the look-ups of normal images use of it, for reports."""

from dataclasses import dataclass

from torch import Tensor

FEATURES = 32  # images whose queries are kept to be shown beside the items
SHOWN = 4  # most used items of a location that are decoded


@dataclass(frozen=True, eq=False)
class MemoryContents:
    """One memory of a model: L locations (1 where all share the items), N items of D features each.

    Args:
        name: such as `"in-painting memory"`.
        kind: `"learned items"`, `"queue of features"`, or how else the items came to be.
        items: `[L, N, D]` float32.
        queries: `[n, L or more, D]`, what some of the images looked up, to be shown beside the items.
        latest: `[L, at most N, D]`, what a queue would hold after these images; None where there is nothing to compare.
        uses: `[L, N]` int64, look-ups that kept the item.
        weight: `[L, N]` float64, the sum of the weights with which they did.
        images: images that were looked up.
        kept: items that one look-up keeps; 0 where that is not a fixed number.
        decoded: `[SHOWN, H, W]` in -1..1, the most used item of each location, the second and so on, as the student
            draws them; NaN where a location has used fewer. None for a memory of a model that draws nothing.
    """

    name: str
    kind: str
    items: Tensor
    queries: Tensor
    uses: Tensor
    weight: Tensor
    images: int
    kept: int
    latest: Tensor | None = None
    decoded: Tensor | None = None

    @property
    def dead(self) -> Tensor:
        """The fraction of each location's items that no look-up kept, `[L]`."""
        return (self.uses == 0).double().mean(1)

"""Features of normal images, gathered from a stream of any length in bounded memory."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simsid.models import feature_jitter, feature_synthetic
from simsid.models.feature_config import FeatureConfig
from simsid.models.feature_pooled import lung_mask

KINDS = ("jittered", "painted")

Entry = dict[str, tuple[list[Tensor], Tensor]]
"""Pooled features of each layer and the in-painting's features of one image, by kind of copy."""

Describe = Callable[[Tensor], tuple[list[Tensor], Tensor]]
"""Images `[B, 1, H, W]` to pooled features, `[B, C]` for each layer, and the in-painting's, `[B, L, C]`."""


@dataclass(frozen=True)
class FeatureSample:
    """Features of n normal images.

    Args:
        clean: pooled features of the images, `[n, C]` for each layer.
        jittered: those of one jittered copy of each, or None.
        painted: those of another jittered copy with painted opacities, or None.
        grid: float16 `[n, L, C]`, the in-painting's features; with jittered copies `[2 n, L, C]`, the images first.
        seen: images that the stream had.
    """

    clean: list[Tensor]
    jittered: list[Tensor] | None
    painted: list[Tensor] | None
    grid: Tensor
    seen: int

    @property
    def count(self) -> int:
        """Number of images, n."""
        return len(self.clean[0])

    def select(self, chosen: Tensor) -> "FeatureSample":
        """Return the images of the indices `chosen`, without their copies."""
        return FeatureSample([x[chosen] for x in self.clean], None, None, self.grid[chosen], self.seen)


def gather(
    batches: Iterable[Tensor], describe: Describe, config: FeatureConfig, copies: Collection[str] = ("jittered",)
) -> FeatureSample:
    """Encode a uniform sample of at most `config.most_images` images, and copies of each.

    Which images are kept is decided as they come (reservoir sampling): a stream of N images, M kept, is encoded
    M (1 + ln(N / M)) times and read once. The same images in the same order give the same sample.

    Args:
        batches: images `[b, 1, H, W]` in -1..1 on the device of the encoder.
        describe: computes the features of a batch.
        config: limits, seed and lung weight.
        copies: `"jittered"` and `"painted"`, those that are wanted.
    """
    choose = np.random.default_rng(config.seed)
    copier = _Copier(config, copies)
    slots: list[Entry] = []
    seen = 0
    for batch in batches:
        targets, rows = [], []
        for i in range(len(batch)):
            slot = seen if seen < config.most_images else int(choose.integers(0, seen + 1))
            seen += 1
            if slot < config.most_images:
                targets.append(slot)
                rows.append(i)
        if not rows:
            continue
        images = batch[rows]
        described = {kind: describe(copy) for kind, copy in copier.copies(images)}
        for i, target in enumerate(targets):
            # Clones: a view would keep its whole batch in memory.
            entry = {
                kind: ([x[i].clone() for x in pooled], grid[i].half()) for kind, (pooled, grid) in described.items()
            }
            if target < len(slots):
                slots[target] = entry
            else:
                slots.append(entry)
    return _stacked(slots, seen)


class _Copier:
    """Makes the copies of an image from random numbers that do not depend on the batches or on the other copies."""

    def __init__(self, config: FeatureConfig, kinds: Collection[str]) -> None:
        self.kinds = kinds
        self.generators = {kind: torch.Generator().manual_seed(config.seed + i) for i, kind in enumerate(KINDS)}
        size = (config.image_size, config.image_size)
        self.mask = lung_mask(*size) if config.weight == "lungs" else torch.ones(size, dtype=torch.bool)

    def copies(self, images: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield each kind and its images."""
        yield "clean", images
        split = feature_jitter.DRAWS
        if "jittered" in self.kinds:
            yield "jittered", feature_jitter.jitter(images, self._draws("jittered", len(images), split))
        if "painted" in self.kinds:
            # Of another jittered copy: against the very same one the classifier would learn the difference alone.
            draws = self._draws("painted", len(images), split + feature_synthetic.DRAWS)
            moved = feature_jitter.jitter(images, draws[:, :split])
            yield "painted", feature_synthetic.paint(moved, draws[:, split:], self.mask)

    def _draws(self, kind: str, images: int, numbers: int) -> Tensor:
        return torch.rand(images, numbers, generator=self.generators[kind])


def _stacked(slots: list[Entry], seen: int) -> FeatureSample:
    if not slots:
        return FeatureSample([torch.zeros(0, 0)], None, None, torch.zeros(0, 0, 0), seen)
    pooled = {kind: [torch.stack(values) for values in zip(*(entry[kind][0] for entry in slots))] for kind in slots[0]}
    kinds = [kind for kind in ("clean", "jittered") if kind in slots[0]]
    grid = torch.stack([entry[kind][1] for kind in kinds for entry in slots])
    return FeatureSample(pooled["clean"], pooled.get("jittered"), pooled.get("painted"), grid, seen)

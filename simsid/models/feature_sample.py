"""Features of normal images, gathered from a stream of any length in bounded memory."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simsid.models import feature_jitter, feature_synthetic
from simsid.models.feature_config import FeatureConfig
from simsid.models.feature_pooled import lung_mask

Describe = Callable[[Tensor], tuple[list[Tensor], Tensor]]
"""Images `[B, 1, H, W]` to pooled features, `[B, C]` for each layer, and the in-painting's, `[B, L, C]`."""


@dataclass(frozen=True)
class FeatureSample:
    """Features of n normal images.

    Args:
        clean: pooled features of the images, `[n, C]` for each layer.
        jittered: those of one jittered copy of each.
        painted: those of another jittered copy with painted opacities, or None.
        grid: float16 `[2 n, L, C]`, the in-painting's features: the images, then the jittered copies.
        seen: images that the stream had.
    """

    clean: list[Tensor]
    jittered: list[Tensor]
    painted: list[Tensor] | None
    grid: Tensor
    seen: int

    @property
    def count(self) -> int:
        """Number of images, n."""
        return len(self.clean[0])


def gather(batches: Iterable[Tensor], describe: Describe, config: FeatureConfig, *, painted: bool) -> FeatureSample:
    """Encode a uniform sample of at most `config.most_images` images and one jittered copy of each.

    Which images are kept is decided as they come (reservoir sampling): a stream of N images, M kept, is encoded
    M (1 + ln(N / M)) times and read once. The same images in the same order give the same sample.

    Args:
        batches: images `[b, 1, H, W]` in -1..1 on the device of the encoder.
        describe: computes the features of a batch.
        config: limits, seed and lung weight.
        painted: whether to encode a copy with painted opacities too.
    """
    choose = np.random.default_rng(config.seed)
    jitter_draws = torch.Generator().manual_seed(config.seed)
    paint_draws = torch.Generator().manual_seed(config.seed + 1)
    everywhere = config.weight == "uniform" or not isinstance(config.weight, str)
    size = (config.image_size, config.image_size)
    mask = torch.ones(size, dtype=torch.bool) if everywhere else lung_mask(*size)
    slots: list[tuple[Tensor, ...]] = []
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
        jittered = feature_jitter.jitter(images, torch.rand(len(rows), feature_jitter.DRAWS, generator=jitter_draws))
        (clean, grid), (moved, moved_grid) = describe(images), describe(jittered)
        columns = [*clean, *moved, grid.half(), moved_grid.half()]
        if painted:
            # A copy of its own: against the very same jittered image the classifier would learn the difference alone.
            draws = torch.rand(len(rows), feature_jitter.DRAWS + feature_synthetic.DRAWS, generator=paint_draws)
            copies = feature_jitter.jitter(images, draws[:, : feature_jitter.DRAWS])
            columns += describe(feature_synthetic.paint(copies, draws[:, feature_jitter.DRAWS :], mask))[0]
        for target, values in zip(targets, zip(*columns)):
            # Clones: a view would keep its whole batch in memory.
            entry = tuple(value.clone() for value in values)
            if target < len(slots):
                slots[target] = entry
            else:
                slots.append(entry)
    return _stacked(slots, seen, painted)


def _stacked(slots: list[tuple[Tensor, ...]], seen: int, painted: bool) -> FeatureSample:
    if not slots:
        return FeatureSample([torch.zeros(0, 0)], [torch.zeros(0, 0)], None, torch.zeros(0, 0, 0), seen)
    # Clean and jittered, and painted where wanted, of each layer, and two grids.
    layers = (len(slots[0]) - 2) // (3 if painted else 2)
    columns = [torch.stack(values) for values in zip(*(entry[: 2 * layers] for entry in slots))]
    grid = torch.stack([entry[2 * layers] for entry in slots] + [entry[2 * layers + 1] for entry in slots])
    last = [torch.stack(values) for values in zip(*(entry[2 * layers + 2 :] for entry in slots))]
    return FeatureSample(columns[:layers], columns[layers:], last if painted else None, grid, seen)

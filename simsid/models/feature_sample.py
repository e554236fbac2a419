"""Features of normal images, gathered from a stream of any length in bounded memory."""

import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simsid.distributed import ProcessGroup
from simsid.errors import ProcessGroupError
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

    def to(self, device: torch.device | str) -> "FeatureSample":
        """Return the sample on a device."""

        def moved(layers: list[Tensor] | None) -> list[Tensor] | None:
            return None if layers is None else [x.to(device) for x in layers]

        clean = [x.to(device) for x in self.clean]
        return FeatureSample(clean, moved(self.jittered), moved(self.painted), self.grid.to(device), self.seen)

    def select(self, chosen: Tensor) -> "FeatureSample":
        """Return the images of the indices `chosen`, without their copies."""
        return FeatureSample([x[chosen] for x in self.clean], None, None, self.grid[chosen], self.seen)


def gather(
    batches: Iterable[Tensor],
    describe: Describe,
    config: FeatureConfig,
    copies: Collection[str] = ("jittered",),
    group: ProcessGroup | None = None,
) -> FeatureSample:
    """Encode a uniform sample of at most `config.most_images` images, and copies of each.

    Which images are kept is decided as they come (reservoir sampling): a stream of N images, M kept, is encoded
    M (1 + ln(N / M)) times and read once. The same images in the same order give the same sample, whatever the number
    of ranks: each encodes every `size`-th kept image.

    Args:
        batches: images `[b, 1, H, W]` in -1..1 on the device of the encoder; the same on every rank.
        describe: computes the features of a batch.
        config: limits, seed and lung weight.
        copies: `"jittered"` and `"painted"`, those that are wanted.
        group: ranks that divide the encoding; all receive the whole sample.

    Raises:
        ProcessGroupError: the ranks have different images.
    """
    group = group or ProcessGroup()
    choose = np.random.default_rng(config.seed)
    copier = _Copier(config, copies)
    slots: dict[int, Entry] = {}
    seen = encoded = checksum = 0
    for batch in batches:
        targets, rows = [], []
        for i in range(len(batch)):
            slot = seen if seen < config.most_images else int(choose.integers(0, seen + 1))
            seen += 1
            if slot < config.most_images:
                targets.append(slot)
                rows.append(i)
        if group.size > 1:
            checksum = zlib.crc32(batch.cpu().numpy().tobytes(), checksum)
        draws = copier.draw(len(rows))
        # Of two images of a batch for one slot the later one stays.
        last = sorted(dict(zip(targets, range(len(rows)))).values())
        own = [i for i in last if (encoded + i) % group.size == group.rank]
        encoded += len(rows)
        for target in targets:
            slots.pop(target, None)
        if not own:
            continue
        images = batch[[rows[i] for i in own]]
        described = {kind: describe(copy) for kind, copy in copier.copies(images, draws, own)}
        for i, j in enumerate(own):
            # Clones: a view would keep its whole batch in memory.
            slots[targets[j]] = {
                kind: ([x[i].clone() for x in pooled], grid[i].half()) for kind, (pooled, grid) in described.items()
            }
    return _stacked(_exchanged(slots, (seen, checksum), group), seen)


def _exchanged(slots: dict[int, Entry], images: tuple[int, int], group: ProcessGroup) -> list[Entry]:
    """Return the entries of all ranks in the order of their slots, after a check that the ranks saw the same images."""
    if group.size == 1:
        return [slots[i] for i in sorted(slots)]
    if len(set(group.all_gather_object(images))) > 1:
        raise ProcessGroupError("all ranks must fit to the same images in the same order, got different ones")
    own = {i: {k: ([x.cpu() for x in pooled], grid.cpu()) for k, (pooled, grid) in e.items()} for i, e in slots.items()}
    merged = {i: entry for part in group.all_gather_object(own) for i, entry in part.items()}
    return [merged[i] for i in sorted(merged)]


class _Copier:
    """Makes the copies of an image from random numbers that do not depend on the batches or on the other copies."""

    def __init__(self, config: FeatureConfig, kinds: Collection[str]) -> None:
        self.kinds = kinds
        self.generators = {kind: torch.Generator().manual_seed(config.seed + i) for i, kind in enumerate(KINDS)}
        size = (config.image_size, config.image_size)
        self.mask = lung_mask(*size) if config.weight == "lungs" else torch.ones(size, dtype=torch.bool)

    def draw(self, images: int) -> dict[str, Tensor]:
        """Return the random numbers of the next images, by kind of copy."""
        numbers = {"jittered": feature_jitter.DRAWS, "painted": feature_jitter.DRAWS + feature_synthetic.DRAWS}
        return {kind: torch.rand(images, numbers[kind], generator=self.generators[kind]) for kind in self.kinds}

    def copies(self, images: Tensor, draws: dict[str, Tensor], rows: list[int]) -> Iterator[tuple[str, Tensor]]:
        """Yield each kind and its images, made from `rows` of the random numbers."""
        yield "clean", images
        split = feature_jitter.DRAWS
        if "jittered" in self.kinds:
            yield "jittered", feature_jitter.jitter(images, draws["jittered"][rows])
        if "painted" in self.kinds:
            # Of another jittered copy: against the very same one the classifier would learn the difference alone.
            own = draws["painted"][rows]
            moved = feature_jitter.jitter(images, own[:, :split])
            yield "painted", feature_synthetic.paint(moved, own[:, split:], self.mask)


def _stacked(slots: list[Entry], seen: int) -> FeatureSample:
    if not slots:
        return FeatureSample([torch.zeros(0, 0)], None, None, torch.zeros(0, 0, 0), seen)
    pooled = {kind: [torch.stack(values) for values in zip(*(entry[kind][0] for entry in slots))] for kind in slots[0]}
    kinds = [kind for kind in ("clean", "jittered") if kind in slots[0]]
    grid = torch.stack([entry[kind][1] for kind in kinds for entry in slots])
    return FeatureSample(pooled["clean"], pooled.get("jittered"), pooled.get("painted"), grid, seen)

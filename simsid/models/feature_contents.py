"""Collects the contents and the use of a feature memory's two memories."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from simsid.models.feature_parts import FeatureParts
from simsid.models.memory_contents import FEATURES, MemoryContents


def feature_memories(
    parts: FeatureParts, described: Iterable[tuple[Sequence[Tensor], Tensor]]
) -> tuple[MemoryContents, ...]:
    """Return the in-painting's items and the pooled memory's images, and what images use of them.

    An image uses the stored images that are nearest to it, without itself.

    Args:
        parts: fitted.
        described: pooled features and those of the grid's locations, batch by batch.
    """
    inpainting, pooled = parts.inpainting, parts.pooled
    weight = torch.zeros(inpainting.items.shape[:2], dtype=torch.float64)
    uses, stored = torch.zeros_like(weight, dtype=torch.int64), torch.zeros(1, pooled.images, dtype=torch.int64)
    queries: list[Tensor] = []
    joined: list[Tensor] = []
    count = 0
    for layers, grid in described:
        y = inpainting.project(grid)
        weights = inpainting.weights(y).cpu()
        uses += (weights > 0).sum(0)
        weight += weights.double().sum(0)
        stored += torch.bincount(pooled.nearest(layers).flatten(), minlength=pooled.images).cpu()
        if count < FEATURES:
            queries.append(y.cpu())
            joined.append(pooled.joined(layers)[:, None].cpu())
        count += len(grid)
    items = inpainting.items.float().cpu()
    kept = min(inpainting.topk, items.shape[1])
    rows = pooled.joined_rows()[: pooled.images].cpu() if count else torch.zeros(0)
    near = min(pooled.neighbors, pooled.images - 1)
    return (
        MemoryContents(
            "in-painting memory", "k-means centers", items, torch.cat(queries)[:FEATURES], uses, weight, count, kept
        ),
        MemoryContents(
            "pooled memory", "images", rows[None], torch.cat(joined)[:FEATURES], stored, stored.double(), count, near
        ),
    )

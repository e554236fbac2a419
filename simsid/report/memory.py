"""The part of a report that shows what a model's memories hold and what normal images use of them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simsid.data import ImageSet
from simsid.evaluation import Evaluation
from simsid.models import AnomalyModel, MemoryContents
from simsid.report.examples import encode
from simsid.report.render import data_uri
from simsid.scoring.overlay import gray

NEAREST = 3  # stored images shown beside an image


@dataclass(frozen=True, eq=False)
class Neighbors:
    """An image and the stored images nearest to it: the name of each file, and `[H, W]` in -1..1."""

    name: str
    image: np.ndarray
    nearest: Sequence[tuple[str, np.ndarray]]


@dataclass(frozen=True, eq=False)
class MemoryViews:
    """What the report shows of the memories of a model.

    Args:
        contents: of each memory; empty for a model without one.
        other: the name of another model and one of its memories, to be embedded beside the first; or None.
        neighbors: images and those of the memory that are nearest.
    """

    contents: Sequence[MemoryContents] = ()
    other: tuple[str, MemoryContents] | None = None
    neighbors: Sequence[Neighbors] = ()


def stored_neighbors(model: AnomalyModel, train: ImageSet, images: ImageSet, indices: Sequence[int]) -> list[Neighbors]:
    """Return images at `indices` with the training images that the model finds nearest; none where it stores none.

    Args:
        train: all images that the model was fitted to, in their order.
    """
    chosen = images.select(list(indices))
    found = model.nearest_images(chosen) if len(chosen) else None
    if found is None or int(found.max()) >= len(train):
        return []
    shown = []
    for i, record in enumerate(chosen.records):
        near = found[i, :NEAREST].tolist()
        pictures = train.batch(near)[:, 0].numpy()
        names = [os.path.basename(train.records[j].path) for j in near]
        shown.append(
            Neighbors(os.path.basename(record.path), chosen.batch([i])[0, 0].numpy(), list(zip(names, pictures)))
        )
    return shown


def extremes(evaluation: Evaluation, each: int = 3) -> list[int]:
    """Return the indices of the lowest and the highest scores."""
    order = np.argsort(evaluation.signals[evaluation.default], kind="stable")
    return list(dict.fromkeys([*order[:each].tolist(), *order[-each:].tolist()]))


def section(views: MemoryViews) -> dict[str, Any]:
    """Draw what the template shows."""
    if not views.contents:
        return {"memories": [], "neighbors": []}
    from simsid.report import embedding, figures

    memories = []
    with figures.style():
        for index, contents in enumerate(views.contents):
            panels = [embedding.embed(contents.kind, contents.items, contents.queries)]
            if index == 0 and views.other is not None:
                name, other = views.other
                panels.append(embedding.embed(f"{name}: {other.kind}", other.items, other.queries))
            elif contents.latest is not None:
                title = "latest features, as a queue holds them"
                panels.append(embedding.embed(title, contents.latest, contents.queries))
            drawn = [
                (embedding.alive_figure(contents), f"{contents.name}: fraction of items in use at each location"),
                (embedding.use_figure(contents), f"{contents.name}: how often items are kept, most used first"),
            ]
            drawn += [
                (embedding.embedding_figure(panel), f"{contents.name}: t-SNE of {panel.title} among features of images")
                for panel in panels
            ]
            memories.append(
                {
                    "contents": contents,
                    "panels": panels,
                    "dead": int((contents.uses == 0).sum()),
                    # Fewer look-ups than items leave some untouched, whatever the memory is like.
                    "few": int(contents.uses.sum(1).max()) < contents.uses.shape[1],
                    "plots": [(data_uri(figures.png(figure, dpi=130)), text) for figure, text in drawn],
                    "decoded": [data_uri(encode(picture)) for picture in embedding.montages(contents)],
                }
            )
    neighbors = [
        [(entry.name, data_uri(encode(gray(entry.image), 192)))]
        + [(name, data_uri(encode(gray(image), 192))) for name, image in entry.nearest]
        for entry in views.neighbors
    ]
    return {"memories": memories, "neighbors": neighbors}

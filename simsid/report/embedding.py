"""The drawings of a memory: t-SNE of its items among features of images, what is used, and decoded items."""

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from simsid.models import MemoryContents
from simsid.report.figures import ABNORMAL_COLOR, FAINT, INK, NORMAL_COLOR, PALETTE
from simsid.scoring.overlay import gray

POINTS = 300  # items and features drawn at most, of each
NEIGHBORS = 10  # among which items and features must mix


@dataclass(frozen=True, eq=False)
class Panel:
    """Items of one memory among features of images, in two dimensions.

    Args:
        title: of the panel.
        items, features: `[n, 2]` coordinates.
        mixing: of the ten nearest neighbors of an item, in all dimensions, the fraction that are features, divided by
            that of a perfect mixture: 1 where the items lie among the features, 0 where they lie apart.
    """

    title: str
    items: np.ndarray
    features: np.ndarray
    mixing: float


def embed(title: str, items: Tensor, queries: Tensor) -> Panel:
    """Embed a memory's items and the features that images look up, by t-SNE with a fixed seed.

    Source: SQUID (arXiv 2111.13495), figure 4.

    Args:
        title: of the panel.
        items: `[L, N, D]`.
        queries: `[n, L, D]`.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.neighbors import NearestNeighbors

    chosen = [_some(items.flatten(0, 1).numpy()), _some(queries.flatten(0, 1).numpy())]
    points, first = np.concatenate(chosen).astype(np.float64), len(chosen[0])
    count = min(NEIGHBORS, len(points) - 1)
    found = NearestNeighbors(n_neighbors=count).fit(points).kneighbors(return_distance=False)[:first]
    mixing = float(np.mean(found >= first) / (len(chosen[1]) / (len(points) - 1)))
    if min(points.shape) > 50:
        points = PCA(50, random_state=0).fit_transform(points)
    perplexity = min(30.0, (len(points) - 1) / 3)
    flat = TSNE(perplexity=perplexity, init="random", random_state=0).fit_transform(points)
    return Panel(title, flat[:first], flat[first:], mixing)


def embedding_figure(panel: Panel) -> Figure:
    """Draw items among features."""
    figure = Figure(figsize=(5.4, 4.6))
    axes = figure.add_subplot()
    axes.plot(*panel.features.T, "o", color=NORMAL_COLOR, markersize=3.5, alpha=0.7, label="features of images")
    axes.plot(*panel.items.T, "x", color=ABNORMAL_COLOR, markersize=4.5, label="items")
    axes.set(title=panel.title, xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.01), ncols=2)
    figure.tight_layout()
    return figure


def alive_figure(contents: MemoryContents) -> Figure:
    """Draw the fraction of each location's items that is used."""
    figure = Figure(figsize=(5.4, 3.6))
    axes = figure.add_subplot()
    alive = 1 - contents.dead.numpy()
    side = round(len(alive) ** 0.5)
    axes.imshow(alive.reshape(side, side), vmin=0, vmax=1, cmap="Blues")
    for index, value in enumerate(alive) if side <= 8 else ():
        row, column = divmod(index, side)
        color = "white" if value > 0.6 else INK
        axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=color, fontsize=8)
    axes.set(title="items in use" + (", by location" if side > 1 else ""), xticks=[], yticks=[])
    axes.grid(visible=False)
    figure.tight_layout()
    return figure


def use_figure(contents: MemoryContents) -> Figure:
    """Draw how often the items of each location are kept, the most used first."""
    figure = Figure(figsize=(5.4, 3.6))
    axes = figure.add_subplot()
    ordered = np.sort(contents.uses.numpy(), axis=1)[:, ::-1] / max(contents.images, 1)
    ranks = np.arange(1, ordered.shape[1] + 1)
    for line in ordered if len(ordered) > 1 else ():
        axes.plot(ranks, line, color=FAINT, linewidth=0.6, alpha=0.6)
    axes.plot(ranks, ordered.mean(0), color=PALETTE[0], linewidth=2.2)
    axes.set(title="look-ups of an image that keep an item", xlabel="items of a location, most used first")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.tight_layout()
    return figure


def montages(contents: MemoryContents) -> list[np.ndarray]:
    """Return the decoded items as gray pictures, `[H, W]` uint8: the most used of each location, the second, ..."""
    return [] if contents.decoded is None else [gray(picture) for picture in contents.decoded.numpy()]


def _some(rows: np.ndarray) -> np.ndarray:
    """Return at most `POINTS` rows, drawn with a fixed seed."""
    if len(rows) <= POINTS:
        return rows
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), POINTS, replace=False))]

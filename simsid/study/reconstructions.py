"""One image of each kind and what every model of a study makes of it, as in SQUID's figure 6."""

import pathlib
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simsid.data import ImageSet
from simsid.models.loading import load
from simsid.report.figures import style
from simsid.study.images import StudyImages

MOST_KINDS = 6
"""Columns of the picture: the normal image and at most five findings."""


def draw(folders: Mapping[str, pathlib.Path], images: StudyImages) -> tuple[Figure | None, list[str]]:
    """Draw the first evaluated image of each kind above its reconstructions.

    Args:
        folders: name of each model in the picture, and its folder.
        images: the study's; each model takes them as it was trained on them.

    Returns:
        The figure, or None where no model reconstructs images, and the names of the models that do not.
    """
    rows: list[tuple[str, np.ndarray]] = []
    kinds: list[str] = []
    left_out = []
    for name, folder in folders.items():
        model = load(folder)
        evaluated = images.evaluated(model.preprocessing)
        chosen = first_of_each_kind(evaluated)
        batch = evaluated.batch(list(chosen.values()))
        reconstruction = model.pictures(batch).get("reconstruction")
        if reconstruction is None:
            left_out.append(name)
            continue
        if not rows:
            kinds = list(chosen)
            rows.append(("input", batch[:, 0].numpy()))
        rows.append((name, reconstruction.detach().cpu().numpy()))
    if not rows:
        return None, left_out
    with style():
        figure = Figure(figsize=(1.4 + 1.05 * len(kinds), 0.35 + 1.05 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), len(kinds), squeeze=False)
        for line, (name, pictures) in zip(grid, rows):
            for axes, pixels in zip(line, pictures):
                _show(axes, pixels)
            line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axes, kind in zip(grid[0], kinds):
            axes.set_title(kind, fontsize=9, fontweight="normal", loc="center")
    return figure, left_out


def first_of_each_kind(images: ImageSet) -> dict[str, int]:
    """Return the index of the first normal image and of the first with each finding, in the order of their names."""
    labels, findings = images.labels, images.findings
    chosen = {"normal": int(np.flatnonzero(labels == 0)[0])}
    abnormal = {i: findings[i] or "abnormal" for i in np.flatnonzero(labels == 1).tolist()}
    for kind in sorted(set(abnormal.values()))[: MOST_KINDS - 1]:
        chosen[kind] = next(i for i, finding in abnormal.items() if finding == kind)
    return chosen


def _show(axes: Axes, pixels: np.ndarray) -> None:
    axes.imshow(pixels, cmap="gray", vmin=-1, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)

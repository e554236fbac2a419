"""The figure of a study: AUC along an axis or as bars, or the seconds of an epoch and of a pass."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simsid.report.figures import DASHES, FAINT, PALETTE, style
from simsid.study.studies import Study
from simsid.study.table import Summary


def draw(study: Study, rows: Sequence[Summary], title: str) -> Figure:
    """Draw a study's rows; whiskers are one standard deviation over seeds."""
    with style():
        if study.measures == "seconds":
            return _seconds(rows, title)
        figure = Figure(figsize=(6.4, 3.6 if study.axis else 1.2 + 0.28 * len(rows)), layout="constrained")
        axes = figure.subplots()
        if study.axis:
            _curves(axes, rows)
            axes.set_xlabel(study.axis)
            axes.set_ylabel("AUC")
        else:
            _bars(axes, rows)
            axes.set_xlabel("AUC")
        axes.set_title(title)
        return figure


def _curves(axes: Axes, rows: Sequence[Summary]) -> None:
    presets = list(dict.fromkeys(row.cell.preset for row in rows))
    for index, name in enumerate(presets):
        own = [row for row in rows if row.cell.preset == name]
        values = np.array([row.values[row.signal] for row in own])
        line: Any = {"color": PALETTE[index % len(PALETTE)], "marker": "o", "markersize": 4, "capsize": 3}
        dashes = "-" if index == 0 else (0, DASHES[(index - 1) % len(DASHES)])
        axes.errorbar(
            [row.cell.x or 0.0 for row in own],
            values[:, 0],
            np.nan_to_num(values[:, 1]),
            linestyle=dashes,
            label=f"{name} ({own[0].signal})",
            **line,
        )
    axes.legend()


def _bars(axes: Axes, rows: Sequence[Summary]) -> None:
    values = np.array([row.values[row.signal] for row in rows])
    places = np.arange(len(rows))
    colors = [PALETTE[1] if row.verdict == "reference" else PALETTE[0] for row in rows]
    axes.barh(places, values[:, 0], xerr=np.nan_to_num(values[:, 1]), color=colors, height=0.7, capsize=3)
    axes.axvline(0.5, color=FAINT, linewidth=0.9)
    axes.set_yticks(places, [row.cell.label for row in rows])
    axes.set_xlim(min(0.4, float((values[:, 0] - np.nan_to_num(values[:, 1])).min()) - 0.02), 1)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def _seconds(rows: Sequence[Summary], title: str) -> Figure:
    figure = Figure(figsize=(6.4, 1.2 + 0.4 * len(rows)), layout="constrained")
    places = np.arange(len(rows))
    columns = (
        ("seconds an epoch", [row.epoch_seconds or 0.0 for row in rows]),
        ("milliseconds an image, scoring", [1000 * row.image_seconds for row in rows]),
    )
    for axes, (label, values) in zip(figure.subplots(1, 2, sharey=True), columns):
        axes.barh(places, values, color=PALETTE[0], height=0.6)
        axes.set_yticks(places, [row.cell.label for row in rows])
        axes.set_xlabel(label)
        axes.invert_yaxis()
    axes.invert_yaxis()
    figure.suptitle(title, x=0.02, ha="left")
    return figure

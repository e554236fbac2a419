"""The matplotlib drawings of a report: ROC and precision-recall curves, score histograms, and the README's picture.

Nothing here uses `pyplot`, so drawing needs no display and leaves the caller's open figures alone.
"""

import io
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from simsid.evaluation import Evaluation, Row
from simsid.metrics import curves
from simsid.report.examples import Example, heat_limit, pictures

# The palette of Okabe and Ito, which color-blind readers can tell apart; the default signal is the first, a thick line.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ((5, 1.5), (1.5, 1.2), (6, 1.5, 1.5, 1.5), (3, 2), (8, 2))
NORMAL_COLOR, ABNORMAL_COLOR = "#56B4E9", "#D55E00"
INK, FAINT = "#1b2430", "#8a94a0"
SETTINGS = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
}


def style() -> AbstractContextManager[None]:
    """Return a context with the same settings for every figure, whatever the user's matplotlib is set to."""
    return matplotlib.style.context(["default", SETTINGS])


def interval(row: Row) -> str:
    """Format the AUC of a row with its confidence interval."""
    return f"{row.auc:.3f} [{row.low:.3f}, {row.high:.3f}]"


def roc_figure(evaluation: Evaluation, totals: Sequence[Row]) -> Figure:
    """Draw the ROC curve of every signal; `totals` holds the row of each over all abnormal images, default first."""
    figure = Figure(figsize=(5.4, 4.6 + _legend_height(totals)))
    _draw_roc(figure, 0.68, 4.2, evaluation, totals)
    return figure


def precision_figure(evaluation: Evaluation, totals: Sequence[Row]) -> Figure:
    """Draw the precision-recall curve of every signal; `totals` as in `roc_figure`."""
    figure = Figure(figsize=(5.4, 4.6 + _legend_height(totals)))
    axes = _square_axes(figure, 0.68, 4.2)
    for index, row in enumerate(totals):
        points = curves(evaluation.labels, evaluation.signals[row.signal])
        label = f"{_plain(row.signal)}  average precision {row.average_precision:.3f}"
        axes.step(points.true_positive_rate, points.precision, where="pre", label=label, **_line(index))
    chance = float(np.mean(evaluation.labels))
    axes.axhline(chance, color=FAINT, linewidth=0.9, label=f"chance {chance:.3f} (fraction of abnormal images)")
    _label_square(
        axes, 4.2, "Precision and recall", "recall (sensitivity)", "precision (fraction abnormal of those flagged)"
    )
    return figure


def histogram_figure(evaluation: Evaluation, signal: str, threshold: float | None) -> Figure:
    """Draw one panel for each finding on common axes, over the normal images; `threshold` is a dashed line."""
    scores, kinds = evaluation.signals[signal], evaluation.kinds
    low, high = np.quantile(scores, [0.005, 0.995])
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    margin = 0.03 * (high - low) or max(abs(high), 1.0) * 1e-3
    edges = np.linspace(low - margin, high + margin, 37)

    def fractions(values: np.ndarray) -> np.ndarray:
        return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)

    normal = fractions(scores[evaluation.labels == 0])
    abnormal = [fractions(scores[(evaluation.labels == 1) & evaluation.subset(kind)]) for kind in kinds]
    top = 1.08 * max(normal.max(), *(values.max() for values in abnormal))
    height = 0.65 + max(0.7 * len(kinds), 1.6)
    figure = Figure(figsize=(5.4, height))
    panels = figure.subplots(len(kinds), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.24, right=0.97, top=1.0 - 0.33 / height, bottom=0.3 / height, hspace=0.12)
    for axes, kind, values in zip(panels, kinds, abnormal):
        axes.stairs(normal, edges, fill=True, color=NORMAL_COLOR, alpha=0.55)
        axes.stairs(normal, edges, color="#2b7fb0", linewidth=0.8)
        axes.stairs(values, edges, fill=True, color=ABNORMAL_COLOR, alpha=0.45)
        axes.stairs(values, edges, color=ABNORMAL_COLOR, linewidth=1.3)
        axes.set(xlim=(edges[0], edges[-1]), ylim=(0.0, top), yticks=[])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False)
        axes.tick_params(axis="x", length=3 if axes is panels[-1] else 0)
        name = textwrap.fill(_plain(kind), 17)
        axes.text(-0.03, 0.12, name, transform=axes.transAxes, ha="right", va="bottom", color="#a84900")
        if threshold is not None:
            axes.axvline(threshold, color=INK, linewidth=1.0, dashes=(4, 2))
    figure.text(0.02, 1.0 - 0.2 / height, _plain(signal), fontsize=10.5, fontweight="bold")
    return figure


def picture_figure(examples: Sequence[Example], evaluation: Evaluation | None) -> Figure:
    """Draw 12 inches of width: ROC curves at the left where there is an evaluation, then two examples a line."""
    left = 0.1 if evaluation is None else 4.6
    columns = max(len(example.pictures) for example in examples)
    side = (12.0 - left - 0.3) / (2 * columns)
    height = 0.3 + -(-len(examples) // 2) * (side + 0.3)
    if evaluation is None:
        figure = Figure(figsize=(12.0, height))
    else:
        totals = [row for row in evaluation.rows() if row.finding is None]
        figure = Figure(figsize=(12.0, max(height, 3.9 + _legend_height(totals))))
        _draw_roc(figure, 0.6, 3.5, evaluation, totals)
    limit = heat_limit(examples)
    width, height = figure.get_size_inches()
    for index, example in enumerate(examples):
        line, column = divmod(index, 2)
        bottom = height - 0.3 - (line + 1) * (side + 0.3) + 0.06
        for part, (name, pixels) in enumerate(pictures(example, limit)):
            corner = left + (columns * column + part) * side + 0.2 * column
            axes = figure.add_axes((corner / width, bottom / height, 0.97 * side / width, 0.97 * side / height))
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
            axes.set_axis_off()
            if line == 0:
                figure.text((corner + 0.485 * side) / width, 1.0 - 0.22 / height, name, ha="center")
            if part == 0:
                heading = f"{_plain(example.finding)}   score {example.score:.3g}"
                figure.text(corner / width, (bottom + 0.97 * side + 0.05) / height, heading)
    return figure


def png(figure: Figure, dpi: int = 200) -> bytes:
    """Encode a figure; 200 dots an inch are about twice what the page shows, so that it prints sharply."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _plain(text: str, limit: int = 34) -> str:
    """Shorten a name for a plot and escape dollar signs, which would start matplotlib's mathematics."""
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return text.replace("$", r"\$")


def _line(index: int) -> dict[str, Any]:
    """Return the line style of the signal at an index; index 0 is the default signal."""
    if index == 0:
        return {"color": PALETTE[0], "linewidth": 2.6, "zorder": 5}
    cycle, position = divmod(index - 1, len(PALETTE) - 1)
    # Each further round of colors has other dashes, so that no two curves look alike.
    dashes = DASHES[(position + cycle) % len(DASHES)]
    return {"color": PALETTE[1:][position], "linewidth": 1.4, "dashes": dashes, "zorder": 4}


def _legend_height(totals: Sequence[Row]) -> float:
    """Return the inches below square axes for their labels and a legend of one line a signal and one more."""
    return 0.55 + 0.185 * (len(totals) + 1)


def _square_axes(figure: Figure, left: float, side: float) -> Axes:
    """Add square axes at the top of a figure, `left` and `side` in inches."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, 1.0 - (0.3 + side) / height, side / width, side / height))


def _label_square(axes: Axes, side: float, title: str, x: str, y: str) -> None:
    """Label square axes and put the legend half an inch below them; `side` is theirs in inches."""
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=x, ylabel=y, title=title)
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.52 / side), handlelength=3.4, borderaxespad=0.0)


def _draw_roc(figure: Figure, left: float, side: float, evaluation: Evaluation, totals: Sequence[Row]) -> None:
    axes = _square_axes(figure, left, side)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.9)
    for index, row in enumerate(totals):
        points = curves(evaluation.labels, evaluation.signals[row.signal])
        label = f"{_plain(row.signal)}  AUC {interval(row)}"
        axes.plot(points.false_positive_rate, points.true_positive_rate, label=label, **_line(index))
    row = totals[0]
    if row.false_positive_rate is not None and row.sensitivity is not None:
        label = "default signal at its held-out threshold"
        marker: dict[str, Any] = {"markersize": 7, "color": PALETTE[0], "markeredgecolor": "white", "zorder": 6}
        axes.plot(row.false_positive_rate, row.sensitivity, "o", label=label, **marker)
    _label_square(axes, side, "ROC", "false positive rate (1 - specificity)", "true positive rate (sensitivity)")

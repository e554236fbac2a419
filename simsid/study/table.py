"""A study's results as rows: mean and deviation over seeds, and a t-test against the full model."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simsid.models.presets import PRESETS
from simsid.study.cells import Result
from simsid.study.images import StudyImages
from simsid.study.plan import Plan, configuration, is_network
from simsid.study.studies import Cell, Study

SIGNIFICANCE = 0.05
"""Level of the t-test, as in the papers."""

Results = Mapping[str, Sequence[Result]]
"""The results of each cell by its label, one for each seed."""


@dataclass(frozen=True)
class Summary:
    """One row of the table."""

    cell: Cell
    signal: str
    values: dict[str, tuple[float, float]]
    """AUC of each signal over the seeds: mean and standard deviation, NaN for the deviation of one seed."""
    interval: tuple[float, float]
    """95 % interval of the first seed's AUC of the model's own signal."""
    p_value: float
    """Of the two-sample t-test against the reference; NaN where it cannot be computed."""
    verdict: str
    """`"reference"`, `"better"` or `"worse"` at the 5 % level, or empty."""
    best_accuracy: float
    best_f1: float
    epoch_seconds: float | None
    """Of the fastest seed: other work on the machine makes times longer, never shorter."""
    image_seconds: float
    """Likewise."""
    seeds: int
    """Seeds that the means are of."""


def p_value(values: Sequence[float], reference: Sequence[float]) -> float:
    """Return the two-sided p value of Student's two-sample t-test; NaN with fewer than two values or no variance."""
    from scipy.stats import ttest_ind

    if min(len(values), len(reference)) < 2 or (np.ptp(values) == 0 and np.ptp(reference) == 0):
        return math.nan
    with warnings.catch_warnings():
        # A model that does not depend on the seed has equal values, of which scipy warns.
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(ttest_ind(values, reference).pvalue)


def summarize(study: Study, cells: Sequence[Cell], results: Results, images: StudyImages) -> list[Summary]:
    """Return the rows of the cells that have results, in their order."""
    rows = []
    for cell in (cell for cell in cells if results.get(cell.label)):
        found = results[cell.label]
        own = [result.auc[result.signal] for result in found]
        reference = _reference(study, cell, cells, images)
        against = [result.auc[result.signal] for result in results.get(reference.label, ())] if reference else []
        p, verdict = math.nan, "reference" if reference == cell else ""
        if reference is not None and reference != cell:
            p = p_value(own, against)
            if p < SIGNIFICANCE:
                verdict = "better" if np.mean(own) > np.mean(against) else "worse"
        first, epochs = found[0], [result.epoch_seconds for result in found if result.epoch_seconds is not None]
        rows.append(
            Summary(
                cell=cell,
                signal=first.signal,
                values={name: _mean_and_deviation([result.auc[name] for result in found]) for name in first.auc},
                interval=(first.low[first.signal], first.high[first.signal]),
                p_value=p,
                verdict=verdict,
                best_accuracy=float(np.mean([result.best_accuracy for result in found])),
                best_f1=float(np.mean([result.best_f1 for result in found])),
                epoch_seconds=min(epochs, default=None),
                image_seconds=min(result.image_seconds for result in found),
                seeds=len(found),
            )
        )
    return rows


def main_table(rows: Sequence[Summary], with_paper: bool) -> tuple[list[str], list[list[str]]]:
    """Return head and cells of the table by the models' own signals."""
    with_paper = with_paper and any(row.cell.paper is not None for row in rows)
    head = ["model", *(["paper"] if with_paper else []), "signal", "AUC", "95 % interval", "p", "difference"]
    head += ["accuracy*", "F1*", "s an epoch", "ms an image"]
    lines = []
    for row in rows:
        line = [row.cell.label]
        if with_paper:
            line.append("" if row.cell.paper is None else f"{row.cell.paper:.3f}")
        line += [row.signal, _with_deviation(row.values[row.signal]), "{:.3f} to {:.3f}".format(*row.interval)]
        line += ["" if math.isnan(row.p_value) else f"{row.p_value:.3f}", row.verdict]
        line += [f"{row.best_accuracy:.3f}", f"{row.best_f1:.3f}"]
        line += ["" if row.epoch_seconds is None else f"{row.epoch_seconds:.2f}", f"{1000 * row.image_seconds:.1f}"]
        lines.append(line)
    return head, lines


def signal_table(rows: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Return head and cells of the table of all signals; a model with one signal has it in the main table."""
    rows = [row for row in rows if len(row.values) > 1]
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    lines = [[row.cell.label, *(_with_deviation(row.values.get(name)) for name in names)] for row in rows]
    return ["AUC of", *names], lines


def as_text(head: list[str], lines: list[list[str]]) -> str:
    """Lay a table out for a terminal."""
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
    ruled = [head, ["-" * width for width in widths], *lines]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in ruled)


def as_markdown(head: list[str], lines: list[list[str]]) -> str:
    """Lay a table out for a Markdown page."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def notes(rows: Sequence[Summary], images: StudyImages, plan: Plan | None) -> list[str]:
    """Return the sentences that belong to a table: data, training, and what its columns are."""
    normal, abnormal = images.evaluated_counts
    where = "test images" if images.split == "test" else "validation images, whose normal ones also choose the epoch"
    lines = [
        f"{images.name}: {images.train_count} training images; evaluated on {normal} normal and {abnormal} abnormal"
    ]
    fewest, most = min(row.seeds for row in rows), max(row.seeds for row in rows)
    lines[0] += f" {where}; {most if fewest == most else f'{fewest} to {most}'} seed{'s' if most > 1 else ''}."
    if plan is not None and any(is_network(row.cell) for row in rows):
        width = "each preset's width" if plan.width is None else f"width {plan.width}"
        rates = plan.training(rows[0].cell, 0, "auto", images.digits)
        epochs = f"{plan.epochs} epoch{'s' if plan.epochs > 1 else ''}"
        augmented = "" if rates.translate or rates.scale else ", not augmented"
        lines.append(
            f"Networks: {width}, {epochs}, learning rate {rates.learning_rate:g} to "
            f"{rates.final_learning_rate:g}{augmented}{', ' + plan.measured if plan.measured else ''}."
        )
    lines.append("AUC: mean and standard deviation over seeds. Interval: DeLong, of the first seed.")
    if not all(math.isnan(row.p_value) for row in rows):
        lines.append("p: two-sample t-test against the reference; a difference is named where p is below 0.05.")
    lines.append("Times: medians, of the fastest seed; other work on the machine makes them longer.")
    lines.append(
        "accuracy*, F1*: at the threshold of highest accuracy on these very images, as in the papers: optimistic."
    )
    if any(row.cell.paper is not None for row in rows) and not images.digits:
        lines.append("paper: on ZhangLab's official test set after 200 epochs; other images than these.")
    return lines


def csv_rows(cells: Sequence[Cell], results: Results) -> list[list[Any]]:
    """Return one row for each cell, seed and signal."""
    return [
        [cell.label, seed, name, int(name == result.signal), result.auc[name], result.low[name], result.high[name]]
        for cell in cells
        for seed, result in enumerate(results.get(cell.label, ()))
        for name in result.auc
    ]


CSV_COLUMNS = ["model", "seed", "signal", "own", "auc", "low", "high"]


def _reference(study: Study, cell: Cell, cells: Sequence[Cell], images: StudyImages) -> Cell | None:
    """Return the cell that another is tested against, where it is among the cells."""
    for other in cells:
        if other.label == study.reference:
            return other
    name = study.reference or cell.preset
    if name not in PRESETS:  # a label that --only leaves out
        return None
    unchanged = configuration(Cell(name, name), images.digits)
    for other in cells:
        plain = other.preset == name and other.normal_share == 1.0 and not other.training
        if plain and configuration(other, images.digits) == unchanged:
            return other
    return None


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _with_deviation(value: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    mean, deviation = value
    return f"{mean:.3f}" if math.isnan(deviation) else f"{mean:.3f} ± {deviation:.3f}"

"""One self-contained HTML page of an evaluation or a scoring, and one picture of it.

The page makes no request: styles, pictures and the script that sorts its table are part of the file. It reads and
prints without the script too.
"""

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from simsid import checkpoint
from simsid.errors import InputError
from simsid.evaluation import Evaluation, Row
from simsid.report.examples import Example, color_bar, encode, heat_limit, label_name, pictures
from simsid.report.film import FilmRow
from simsid.report.memory import MemoryViews, section
from simsid.report.render import data_uri, render

ROW_LIMIT = 5000  # rows of the table: about 1 MB of HTML with six signals


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    evaluation: Evaluation | None,
    examples: Sequence[Example],
    configuration: Mapping[str, Mapping[str, object]],
    versions: Mapping[str, str],
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
    rows: Sequence[FilmRow] = (),
    descriptions: Mapping[str, str] | None = None,
    memory: MemoryViews | None = None,
) -> None:
    """Write one HTML page that works offline and prints: curves, histograms, tables, examples and the configuration.

    The same arguments give the same bytes. The file is replaced atomically.

    Args:
        path: the file to write; an existing file is replaced.
        title: the heading.
        evaluation: scores of labelled images, or None where there are no labels: then the page has no curves,
            histograms and tables of them. With `evaluation.in_sample` the page says so beside the figures.
        examples: the pictures to show, in this order; may be empty.
        configuration: sections of name and value (`{"model": {...}, "training": {...}}`).
        versions: name to version of the software that computed this.
        notes: sentences for the top of the page, such as where the images come from.
        warnings: sentences that a reader must not miss, such as a distribution shift; they stand above everything.
        rows: the table of all files; beyond `ROW_LIMIT` the highest scores are kept and the page says so.
        descriptions: what each signal measures, by name.
        memory: what the model's memories hold; None leaves that part out.
    """
    limit = heat_limit(examples)
    files, hidden = _highest(rows)
    page = render(
        "page.html",
        title=title,
        warnings=warnings,
        notes=notes,
        evaluation=evaluation,
        figures=None if evaluation is None else _figures(evaluation),
        descriptions=descriptions or {},
        examples=[_card(example, limit) for example in examples],
        scale=data_uri(color_bar()) if any(example.heat_map is not None for example in examples) else None,
        limit=limit,
        rows=files,
        hidden=hidden,
        folder=_folder(files),
        anchors={example.path: f"#example-{index}" for index, example in enumerate(examples, 1)},
        signals=list(dict.fromkeys(name for row in files for name in row.signals)),
        memory=None if memory is None else section(memory),
        labels={label: label_name(label) for label in (0, 1, None)},
        configuration={**configuration, "versions": versions},
    )
    checkpoint.write_file(pathlib.Path(path), page)


def write_picture(
    path: str | os.PathLike[str], examples: Sequence[Example], evaluation: Evaluation | None = None
) -> None:
    """Write one PNG, 1200 pixels wide: ROC curves at the left, examples at the right (or alone, without labels).

    Args:
        path: the file to write; it is replaced atomically.
        examples: 1 or more, two a line.
        evaluation: the scores behind the ROC curves, or None.

    Raises:
        InputError: there are no examples.
    """
    from simsid.report import figures

    if not examples:
        raise InputError("examples must hold at least one example for a picture, got none")
    with figures.style():
        checkpoint.write_file(pathlib.Path(path), figures.png(figures.picture_figure(examples, evaluation), dpi=100))


def _figures(evaluation: Evaluation) -> dict[str, object]:
    """Compute the rows of an evaluation and draw its plots, for the template."""
    from simsid.report import figures

    rows = evaluation.rows()
    totals = [row for row in rows if row.finding is None]
    # With a single finding its rows repeat those over all abnormal images.
    listed = rows if len(evaluation.kinds) > 1 else [row for row in rows if row.finding is not None]
    areas = "; ".join(f"{row.signal} AUC {figures.interval(row)}" for row in totals)
    precisions = "; ".join(f"{row.signal} {row.average_precision:.3f}" for row in totals)
    with figures.style():
        curves = [
            (figures.roc_figure(evaluation, totals), f"ROC curves, default first: {areas}"),
            (figures.precision_figure(evaluation, totals), f"Precision-recall curves, default first: {precisions}"),
        ]
        histograms = [
            (
                figures.histogram_figure(evaluation, row.signal, row.threshold),
                f"Histograms of {row.signal}: abnormal images of each finding over the normal images",
            )
            for row in totals
        ]
        drawn = [[(data_uri(figures.png(figure)), text) for figure, text in plots] for plots in (curves, histograms)]
    held_out = len((evaluation.holdout or {}).get(evaluation.default, ()))
    return {
        "total": totals[0],
        "curves": drawn[0],
        "histograms": list(zip(evaluation.signals, drawn[1])),
        "by_finding": _grouped(listed, "finding"),
        "by_signal": _grouped(listed, "signal"),
        "held_out": held_out,
        "too_few": (held_out + 1) * evaluation.false_positive_rate < 1.0,
    }


def _grouped(rows: Iterable[Row], name: str) -> dict[str | None, list[Row]]:
    """Group rows by one of their fields, in the order of the first row of each group."""
    groups: dict[str | None, list[Row]] = {}
    for row in rows:
        groups.setdefault(getattr(row, name), []).append(row)
    return groups


def _card(example: Example, limit: float) -> dict[str, object]:
    file, label = pathlib.PurePath(example.path).name, label_name(example.label)
    finding = example.finding or label
    return {
        "path": example.path,
        "file": file,
        "label": label,
        "finding": finding,
        "score": example.score,
        "pictures": [
            (name, data_uri(encode(pixels)), f"{name} of {file}, {finding} ({label}), score {example.score:.4g}")
            for name, pixels in pictures(example, limit)
        ],
    }


def _highest(rows: Sequence[FilmRow]) -> tuple[list[FilmRow], int]:
    """Sort by score, files without one last; return those that the page has room for and the number of the others."""
    ordered = sorted(rows, key=lambda row: (row.score is None, -(row.score or 0.0)))
    return ordered[:ROW_LIMIT], max(0, len(ordered) - ROW_LIMIT)


def _folder(rows: Iterable[FilmRow]) -> str:
    """Return the folder that all paths lie in, with its separator, to show once instead of in every row."""
    folders = {os.path.dirname(row.path) for row in rows}
    try:
        common = os.path.commonpath(folders)
    except ValueError:  # none, absolute with relative, or different drives
        return ""
    return os.path.join(common, "") if common else ""

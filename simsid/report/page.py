"""One self-contained HTML page of an evaluation, and one picture of it.

The page makes no request of any kind: styles are inline, pictures are PNGs in base64, and a content security policy
forbids the rest. What comes from file names, findings or configurations is escaped.
"""

import base64
import io
import os
import pathlib
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from simsid.metrics import Evaluation, Row, curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any colour vision; the default signal takes the first, as a thick line.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ((5, 1.5), (1.5, 1.2), (6, 1.5, 1.5, 1.5), (3, 2), (8, 2))
NORMAL_COLOUR, ABNORMAL_COLOUR = "#56B4E9", "#D55E00"
INK, FAINT = "#1b2430", "#8a94a0"
PICTURE_LIMIT = 384  # pixels: a page of 1024 x 1024 films would be too heavy to send by mail

SIGNALS = {
    "discriminator": "how unlike a normal film the discriminator finds the reconstruction (the papers' score)",
    "discriminator_per_image": "the papers' score: how unlike a normal film the discriminator finds the "
    "reconstruction, normalised with each image's own statistics, as in the released evaluation",
    "discriminator_running": "the papers' score, normalised with the running statistics of training",
    "residual": "mean squared difference between input and reconstruction",
    "local_residual": "largest difference between input and reconstruction after 8 x 8 average pooling",
    "focal_residual": "mean difference between input and reconstruction over the worst twentieth of 8 x 8 squares",
    "memory_distance": "how far the image's features lie from what the memory of normal patches returns, "
    "largest over locations",
}

NOTICE = "Research use only. Not a medical device: do not use it for diagnosis, triage or treatment."

STYLE = """
:root { color-scheme: light dark; --ink: #1b2430; --soft: #55606c; --line: #d9dee4; --page: #f6f7f9; --card: #fff;
  --accent: #0072b2; --tint: #eaf3f9; --warn: #7a3e00; --warn-tint: #fff4e5; --warn-line: #e69f00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebee; --soft: #a9b3bd; --line: #39424c; --page: #14181d;
  --card: #1d232a; --accent: #6bb8e8; --tint: #1c3040; --warn: #ffd9a0; --warn-tint: #33270f; --warn-line: #b87d00; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 24px 40px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 14px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 36px 0 4px; }
p { margin: 4px 0 12px; max-width: 86ch; color: var(--soft); }
code { font: 0.92em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.notice { border: 1px solid var(--warn-line); border-left-width: 5px; background: var(--warn-tint); color: var(--warn);
  padding: 8px 14px; border-radius: 6px; max-width: none; font-weight: 600; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; margin: 16px 0; }
.tiles .value { font-size: 27px; font-weight: 650; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tiles .name, .tiles .more { color: var(--soft); font-size: 13px; }
.notes { margin: 12px 0; padding: 10px 14px 10px 32px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 12px; }
figure { margin: 0; }
.plots figure { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 10px; }
.plots .default { border: 2px solid var(--accent); padding: 9px; }
.plots img { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; padding: 4px 14px 10px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding: 8px 0; }
th, td { padding: 5px 9px; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; }
thead th { color: var(--soft); vertical-align: bottom; }
thead .group { text-align: center; border-bottom: 2px solid var(--line); }
th.left { text-align: left; overflow-wrap: break-word; }
th.light { font-weight: 400; padding-left: 20px; min-width: 9em; }
tr.start > * { border-top: 2px solid var(--line); padding-top: 9px; }
.part { border-left: 1px solid var(--line); }
.default-column { background: var(--tint); }
.nowrap { white-space: nowrap; }
.small { font-size: 12px; color: var(--soft); white-space: nowrap; }
.badge { display: inline-block; border-radius: 10px; padding: 0 8px; font-size: 12px; border: 1px solid currentColor;
  font-weight: 600; white-space: nowrap; color: var(--accent); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 12px 0 0; font-size: 13.5px; }
dt { font-weight: 600; } dd { margin: 0; color: var(--soft); }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(350px, 100%), 1fr)); gap: 12px; }
.examples .card { padding: 10px; }
.examples .top { display: flex; justify-content: space-between; gap: 8px; font-size: 14px; margin-bottom: 6px; }
.examples .top b { overflow-wrap: anywhere; }
.examples .images { display: grid; grid-template-columns: repeat(3, 1fr); gap: 4px; }
.examples img { width: 100%; height: auto; display: block; background: #000; border-radius: 3px; }
.examples .images span { font-size: 11.5px; color: var(--soft); text-align: center; }
.examples .file { font-size: 12px; color: var(--soft); overflow-wrap: anywhere; margin-top: 2px; }
.scale { display: inline-block; width: 140px; height: 11px; vertical-align: -1px; border-radius: 2px; margin: 0 6px; }
.settings { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); gap: 12px;
  align-items: start; }
.settings h3 { margin: 0 0 4px; font-size: 15px; }
.settings td, .settings th { padding: 2px 6px 2px 0; text-align: left; font-size: 13px; font-weight: 400; }
.settings th { color: var(--soft); white-space: nowrap; }
footer { margin-top: 32px; color: var(--soft); font-size: 13px; }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --page: #fff; --card: #fff; --accent: #0072b2;
    --tint: #eef4f8; --warn: #5c2f00; --warn-tint: #fff; }
  @page { margin: 13mm; }
  body { font-size: 9.5pt; } main { max-width: none; padding: 0; } h1 { font-size: 19pt; } h2 { margin-top: 22px; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .card, figure, tr { break-inside: avoid; } .wide { overflow: visible; break-inside: auto; }
  .keep { break-inside: avoid; } .tiles { grid-template-columns: repeat(4, 1fr); } h2 { break-after: avoid; }
  .plots { grid-template-columns: 1fr 1fr; } .examples { grid-template-columns: 1fr 1fr; }
  table { font-size: 7.6pt; } .small { font-size: 6.8pt; } th, td { padding: 2px 3px; }
  thead { display: table-header-group; }
}
"""


@dataclass(frozen=True, eq=False)
class Example:
    """One image to show.

    Args:
        path: its file.
        finding: its kind (`"NORMAL"`, `"missing"`, ...).
        label: 0 normal, 1 abnormal, None unknown.
        score: the model's, higher = more anomalous.
        input: `[H, W]` in -1..1.
        reconstruction: `[H, W]` in -1..1.
        heat_map: `[H, W]`, 0 and more, in the same unit for all examples of a page: they share one colour scale.

    Raises:
        ValueError: the three pictures differ in shape or have another number of axes than two.
    """

    path: str
    finding: str
    label: int | None
    score: float
    input: np.ndarray
    reconstruction: np.ndarray
    heat_map: np.ndarray

    def __post_init__(self) -> None:
        shapes = [list(np.shape(picture)) for picture in (self.input, self.reconstruction, self.heat_map)]
        if len(shapes[0]) != 2 or shapes.count(shapes[0]) != 3:
            raise ValueError(f"input, reconstruction and heat_map must share one shape [H, W], got {shapes}")


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    evaluation: Evaluation | None,
    examples: Sequence[Example],
    configuration: dict[str, dict],
    versions: dict[str, str],
    notes: Sequence[str] = (),
) -> None:
    """Write one HTML page that works offline and prints: curves, histograms, tables, examples and the configuration.

    The same arguments give the same bytes. The file appears whole: it is written beside its place, then renamed.

    Args:
        path: the file to write; what is there is replaced.
        title: the heading.
        evaluation: scores of labelled images, or None where there are no labels: then no curves, histograms and tables.
        examples: the pictures to show, in this order; may be empty.
        configuration: sections of name and value (`{"model": {...}, "training": {...}}`).
        versions: name to version of what computed this.
        notes: sentences for the top of the page, such as where the images come from.
    """
    with _style():
        body = [f"<h1>{escape(title)}</h1>", f'<p class="notice" role="note">{NOTICE}</p>']
        rows = evaluation.rows() if evaluation is not None else []
        if evaluation is not None:
            body.append(_tiles(evaluation, rows))
        if notes:
            body.append('<ul class="card notes">' + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
        if evaluation is not None:
            # With a single kind of finding its rows repeat those over all abnormal images.
            listed = rows if len(evaluation.kinds) > 1 else [row for row in rows if row.finding != "all"]
            body += [_curve_section(evaluation, rows), _area_section(evaluation, listed)]
            body += [_histogram_section(evaluation, rows), _figure_section(evaluation, listed)]
        if examples:
            body.append(_example_section(examples))
        body.append(_settings_section(configuration, versions))
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{chr(10).join(body)}
<footer>{NOTICE}</footer>
</main>
</body>
</html>
"""
    # File names may hold bytes that are no UTF-8, which Python carries as lone surrogates.
    _write_whole(path, page.encode("utf-8", errors="backslashreplace"))


def write_picture(
    path: str | os.PathLike[str], examples: Sequence[Example], evaluation: Evaluation | None = None
) -> None:
    """Write one PNG, 1200 pixels wide: ROC curves at the left, examples at the right (or alone, without labels).

    Args:
        path: the file to write; it appears whole.
        examples: 1 or more, two a row.
        evaluation: the scores behind the ROC curves, or None.
    """
    if not examples:
        raise ValueError("examples must hold at least one example for a picture, got none")
    with _style():
        from matplotlib.figure import Figure

        left = 0.1 if evaluation is None else 4.6
        side = (12.0 - left - 0.3) / 6  # six pictures a line
        grid = 0.3 + -(-len(examples) // 2) * (side + 0.3)
        if evaluation is None:
            figure = Figure(figsize=(12.0, grid))
        else:
            totals = [row for row in evaluation.rows() if row.finding == "all"]
            figure = Figure(figsize=(12.0, max(grid, 3.9 + _legend_height(totals))))
            _draw_roc(_square_axes(figure, 0.6, 3.5), evaluation, totals)
        _draw_examples(figure, examples, left, side)
        _write_whole(path, _png(figure, dpi=100))


def _style() -> AbstractContextManager[None]:
    """Plain settings for every figure, whatever the user's matplotlib is set to, undone at the end."""
    import matplotlib.style

    return matplotlib.style.context(
        [
            "default",
            {
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
            },
        ]
    )


def _tiles(evaluation: Evaluation, rows: list[Row]) -> str:
    row = rows[0]
    name = escape(evaluation.default)
    tiles = [
        ("AUC", f"{row.auc:.3f}", f"95 % interval {row.low:.3f} to {row.high:.3f}, signal <code>{name}</code>"),
        ("Images evaluated", str(row.normal + row.abnormal), f"{row.abnormal} abnormal, {row.normal} normal"),
    ]
    if row.threshold is not None:
        held_out = len(evaluation.holdout[evaluation.default])
        rate = evaluation.false_alarm_rate
        short = ", too few to promise that" if (held_out + 1) * rate < 1.0 else ""
        asked = f"of normal images; set for {_percent(rate)} at most on {held_out} held-out normal images{short}"
        tiles.append(("Sensitivity", _percent(row.sensitivity), "of abnormal images lie above the held-out threshold"))
        tiles.append(("False alarms", _percent(row.false_alarm_rate), asked))
    cards = [
        f'<div class="card"><div class="name">{title}</div><div class="value">{value}</div>'
        f'<div class="more">{more}</div></div>'
        for title, value, more in tiles
    ]
    return f'<div class="tiles">{"".join(cards)}</div>'


def _curve_section(evaluation: Evaluation, rows: list[Row]) -> str:
    from matplotlib.figure import Figure

    totals = [row for row in rows if row.finding == "all"]
    plots = []
    for draw, name, figures in (
        (_draw_roc, "ROC curves", [f"{row.signal} AUC {_interval(row)}" for row in totals]),
        (_draw_precision, "Precision-recall curves", [f"{row.signal} {row.average_precision:.3f}" for row in totals]),
    ):
        figure = Figure(figsize=(5.4, 4.6 + _legend_height(totals)))
        draw(_square_axes(figure, 0.68, 4.2), evaluation, totals)
        plots.append(f"<figure>{_image(_png(figure), name + ', default signal first: ' + '; '.join(figures))}</figure>")
    known = "".join(
        f"<dt><code>{escape(name)}</code></dt><dd>{SIGNALS[name]}</dd>"
        for name in evaluation.signals
        if name in SIGNALS
    )
    return (
        "<h2>Curves</h2><p>Every signal over all abnormal images against all normal ones; the thick line is the "
        f"model's default, <code>{escape(evaluation.default)}</code>. A higher score is more anomalous.</p>"
        f'<div class="plots">{"".join(plots)}</div>' + (f'<dl class="card">{known}</dl>' if known else "")
    )


def _area_section(evaluation: Evaluation, rows: list[Row]) -> str:
    """The AUC with its interval, findings down and signals across."""
    signals = list(evaluation.signals)
    area = {(row.finding, row.signal): row for row in rows}
    head = "".join(
        f'<th scope="col"{_default_column(name, evaluation)}><code>{escape(name)}</code></th>' for name in signals
    )
    lines = []
    for finding in dict.fromkeys(row.finding for row in rows):
        cells = []
        for name in signals:
            row = area[finding, name]
            mark = ' <span title="ranks backwards">&#8595;</span>' if row.high < 0.5 else ""
            cells.append(
                f"<td{_default_column(name, evaluation)}><b>{row.auc:.3f}</b>{mark}<br>"
                f'<span class="small">{row.low:.3f} to {row.high:.3f}</span></td>'
            )
        count = area[finding, signals[0]].abnormal
        lines.append(f'<tr><th class="left" scope="row">{_finding(finding)}</th><td>{count}</td>{"".join(cells)}</tr>')
    return (
        '<h2>AUC by finding</h2><div class="card wide keep"><table><caption>Each kind of finding against the same '
        f"{rows[0].normal} normal images, with the 95 % confidence interval. 0.5 is chance; &#8595; marks a signal "
        "that ranks backwards, its whole interval below 0.5. The default signal is tinted.</caption>"
        f'<thead><tr><th class="left" scope="col">Finding</th><th scope="col">Images</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _histogram_section(evaluation: Evaluation, rows: list[Row]) -> str:
    plots = []
    thresholds = {row.signal: row.threshold for row in rows}
    for name in evaluation.signals:
        picture = _image(
            _png(_draw_histograms(evaluation, name, thresholds[name])),
            f"Histograms of {name}: normal images against {', '.join(evaluation.kinds)}",
        )
        kind = ' class="default"' if name == evaluation.default else ""
        plots.append(f"<figure{kind}>{picture}</figure>")
    return (
        "<h2>Scores</h2><p>Share of images by raw score, each kind of finding (orange) over the normal images (blue). "
        "The dashed line is the threshold from held-out normal images, where there are any. Scores beyond the axis "
        f'are counted in the outermost bars.</p><div class="plots">{"".join(plots)}</div>'
    )


def _figure_section(evaluation: Evaluation, rows: list[Row]) -> str:
    """Every figure of every row, the optimistic ones last and labelled so."""
    lines, previous = [], None
    for row in rows:
        if row.signal != previous:
            previous = row.signal
            badge = '<span class="badge">default</span> ' if row.signal == evaluation.default else ""
            threshold = "no held-out normal images" if row.threshold is None else f"threshold {row.threshold:.5g}"
            lines.append(
                f'<tr class="start"><th class="left" colspan="13" scope="rowgroup"><code>{escape(row.signal)}</code> '
                f'{badge}<span class="small">{threshold}</span></th></tr>'
            )
        cells = [
            str(row.abnormal),
            f"{row.auc:.3f}",
            f"{row.low:.3f} to {row.high:.3f}",
            f"{row.average_precision:.3f}",
        ]
        cells += [_number(x) for x in (row.sensitivity, row.specificity, row.false_alarm_rate, row.accuracy, row.f1)]
        cells += [f"{row.best_threshold:.4g}", _number(row.best_accuracy), _number(row.best_f1)]
        data = "".join(
            f'<td class="nowrap{" part" if place in (4, 9) else ""}">{cell}</td>' for place, cell in enumerate(cells)
        )
        lines.append(f'<tr><th class="left light" scope="row">{_finding(row.finding)}</th>{data}</tr>')
    names = ["Images", "AUC", "95 % interval", "Average precision"]
    names += ["Sensi&shy;tivity", "Speci&shy;ficity", "False alarms", "Accuracy", "F1", "Threshold", "Accuracy", "F1"]
    head = "".join(
        f'<th scope="col"{" class=part" if place in (4, 9) else ""}>{name}</th>' for place, name in enumerate(names)
    )
    return (
        "<h2>All figures</h2><p>An image raises an alarm when its raw score lies above the threshold. The threshold "
        f"from held-out normal images is set for at most {_percent(evaluation.false_alarm_rate)} false alarms and "
        "needs no abnormal image, so it is what can be used in practice. The last three columns are <b>optimistic</b>: "
        "they stand at the threshold of highest accuracy on these very images, as the papers report them, which nobody "
        f'knows beforehand.</p><div class="card wide"><table><caption>Abnormal images against {rows[0].normal} normal '
        'ones in every row.</caption><thead><tr><td></td><th class="group" colspan="4" scope="colgroup">Ranking</th>'
        '<th class="group part" colspan="5" scope="colgroup">At the held-out-normal threshold</th>'
        '<th class="group part" colspan="3" scope="colgroup">Optimistic: best on these images</th></tr>'
        f'<tr><th class="left" scope="col">Finding</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _example_section(examples: Sequence[Example]) -> str:
    top = _heat_top(examples)
    cards = []
    for example in examples:
        file = pathlib.PurePath(example.path).name
        label = {0: "normal", 1: "abnormal", None: "unlabelled"}[example.label]
        finding = example.finding or label
        images = []
        for name, pixels in zip(("input", "reconstruction", "heat map"), _pictures(example, top)):
            alt = f"{name} of {file}, {finding} ({label}), score {example.score:.4g}"
            images.append(f"<span>{_image(_encode(pixels), alt)}{name}</span>")
        cards.append(
            f'<div class="card"><div class="top"><b>{escape(finding)}</b>'
            f'<span class="nowrap">score <b>{example.score:.4g}</b></span></div>'
            f'<div class="images">{"".join(images)}</div>'
            f'<div class="file" title="{escape(example.path)}">{escape(file)} &middot; {label}</div></div>'
        )
    stops = ", ".join(
        "#" + "".join(f"{channel:02x}" for channel in colour) for colour in _heat_colours(np.linspace(0.0, 1.0, 9))
    )
    return (
        "<h2>Examples</h2><p>The heat map lies over a dimmed input and shows where the model sees what it did not learn"
        " from normal images. One colour scale serves all examples: 0"
        f'<span class="scale" role="img" aria-label="colour scale from dark to bright" style="background: '
        f'linear-gradient(to right, {stops})"></span>{top:.3g} and more.</p>'
        f'<div class="examples">{"".join(cards)}</div>'
    )


def _settings_section(configuration: dict[str, dict], versions: dict[str, str]) -> str:
    cards = []
    for name, values in [*configuration.items(), ("versions", versions)]:
        lines = "".join(
            f'<tr><th scope="row">{escape(str(key))}</th><td><code>{escape(str(value))}</code></td></tr>'
            for key, value in values.items()
        )
        cards.append(f'<div class="card"><h3>{escape(str(name))}</h3><table>{lines}</table></div>')
    return f'<h2>Configuration and versions</h2><div class="settings">{"".join(cards)}</div>'


def _default_column(name: str, evaluation: Evaluation) -> str:
    return ' class="default-column"' if name == evaluation.default else ""


def _finding(finding: str) -> str:
    return "all abnormal" if finding == "all" else escape(finding)


def _number(value: float | None, form: str = "{:.3f}") -> str:
    return "&ndash;" if value is None else form.format(value)


def _percent(share: float) -> str:
    return f"{100.0 * share:.3g} %"


def _interval(row: Row) -> str:
    return f"{row.auc:.3f} [{row.low:.3f}, {row.high:.3f}]"


def _plain(text: str, limit: int = 34) -> str:
    """Make a name fit for a plot: a dollar sign would start matplotlib's mathematics."""
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return text.replace("$", r"\$")


def _line(place: int) -> dict[str, object]:
    """The look of the place-th signal; the first is the default one."""
    if place == 0:
        return {"color": PALETTE[0], "linewidth": 2.6, "zorder": 5}
    colour = PALETTE[1:][(place - 1) % (len(PALETTE) - 1)]
    return {"color": colour, "linewidth": 1.4, "dashes": DASHES[(place - 1) % len(DASHES)], "zorder": 4}


def _legend_height(totals: list[Row]) -> float:
    """Inches below square axes for their labels and a legend of one line a signal and one more."""
    return 0.55 + 0.185 * (len(totals) + 1)


def _square_axes(figure: "Figure", left: float, side: float) -> "Axes":
    """Add square axes at the top of a figure, `left` and `side` in inches."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, 1.0 - (0.3 + side) / height, side / width, side / height))


def _label_square(axes: "Axes", title: str, x: str, y: str) -> None:
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=x, ylabel=y, title=title)
    below = -0.52 / (axes.get_position().height * axes.figure.get_figheight())
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, below), handlelength=3.4, borderaxespad=0.0)


def _draw_roc(axes: "Axes", evaluation: Evaluation, totals: list[Row]) -> None:
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.9)
    for place, row in enumerate(totals):
        points = curves(evaluation.labels, evaluation.signals[row.signal])
        label = f"{_plain(row.signal)}  AUC {_interval(row)}"
        axes.plot(points.false_positive_rate, points.true_positive_rate, label=label, **_line(place))
    row = totals[0]
    if row.threshold is not None:
        axes.plot(
            row.false_alarm_rate,
            row.sensitivity,
            "o",
            markersize=7,
            color=PALETTE[0],
            markeredgecolor="white",
            zorder=6,
            label="default at its held-out-normal threshold",
        )
    _label_square(axes, "ROC", "false alarms (share of normal images)", "sensitivity (share of abnormal images)")


def _draw_precision(axes: "Axes", evaluation: Evaluation, totals: list[Row]) -> None:
    for place, row in enumerate(totals):
        points = curves(evaluation.labels, evaluation.signals[row.signal])
        label = f"{_plain(row.signal)}  average precision {row.average_precision:.3f}"
        axes.step(points.recall, points.precision, where="pre", label=label, **_line(place))
    share = float(np.mean(evaluation.labels))
    axes.axhline(share, color=FAINT, linewidth=0.9, label=f"chance {share:.3f} (share of abnormal images)")
    _label_square(
        axes, "Precision and recall", "recall (share of abnormal images found)", "precision (share of alarms right)"
    )


def _draw_histograms(evaluation: Evaluation, signal: str, threshold: float | None) -> "Figure":
    """One panel for each kind of finding, all with the same axes, the normal images behind each."""
    from matplotlib.figure import Figure

    scores, kinds = evaluation.signals[signal], evaluation.kinds
    low, high = np.quantile(scores, [0.005, 0.995])
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    margin = 0.03 * (high - low) or max(abs(high), 1.0) * 1e-3
    edges = np.linspace(low - margin, high + margin, 37)

    def share(values: np.ndarray) -> np.ndarray:
        return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)

    normal = share(scores[evaluation.labels == 0])
    shares = [share(scores[(evaluation.labels == 1) & evaluation.subset(kind)]) for kind in kinds]
    height = 0.65 + max(0.7 * len(kinds), 1.6)
    figure = Figure(figsize=(5.4, height))
    panels = figure.subplots(len(kinds), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.24, right=0.97, top=1.0 - 0.33 / height, bottom=0.3 / height, hspace=0.12)
    for axes, kind, values in zip(panels, kinds, shares):
        axes.stairs(normal, edges, fill=True, color=NORMAL_COLOUR, alpha=0.55)
        axes.stairs(normal, edges, color="#2b7fb0", linewidth=0.8)
        axes.stairs(values, edges, fill=True, color=ABNORMAL_COLOUR, alpha=0.45)
        axes.stairs(values, edges, color=ABNORMAL_COLOUR, linewidth=1.3)
        axes.set(
            xlim=(edges[0], edges[-1]), ylim=(0.0, 1.08 * max(normal.max(), *(s.max() for s in shares))), yticks=[]
        )
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False)
        axes.tick_params(axis="x", length=3 if axes is panels[-1] else 0)
        name = textwrap.fill(_plain(kind), 17)
        axes.text(-0.03, 0.12, name, transform=axes.transAxes, ha="right", va="bottom", color="#a84900")
        if threshold is not None:
            axes.axvline(threshold, color=INK, linewidth=1.0, dashes=(4, 2))
    figure.text(0.02, 1.0 - 0.2 / height, _plain(signal), fontsize=10.5, fontweight="bold")
    return figure


def _draw_examples(figure: "Figure", examples: Sequence[Example], left: float, side: float) -> None:
    """Two examples a line from `left` on, three pictures each, `side` inches wide and high."""
    top = _heat_top(examples)
    width, height = figure.get_size_inches()
    for place, example in enumerate(examples):
        line, column = divmod(place, 2)
        bottom = height - 0.3 - (line + 1) * (side + 0.3) + 0.06
        for part, (name, pixels) in enumerate(zip(("input", "reconstruction", "heat map"), _pictures(example, top))):
            corner = left + (3 * column + part) * side + 0.2 * column
            axes = figure.add_axes((corner / width, bottom / height, 0.97 * side / width, 0.97 * side / height))
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
            axes.set_axis_off()
            if line == 0:
                figure.text((corner + 0.485 * side) / width, 1.0 - 0.22 / height, name, ha="center")
            if part == 0:
                heading = f"{_plain(example.finding)}   score {example.score:.3g}"
                figure.text(corner / width, (bottom + 0.97 * side + 0.05) / height, heading)


def _heat_top(examples: Sequence[Example]) -> float:
    """The value at the bright end of the colour scale; a few extreme pixels must not darken all the rest."""
    values = np.concatenate([np.ravel(example.heat_map) for example in examples]).astype(np.float64)
    values = values[np.isfinite(values)]
    top = float(np.quantile(values, 0.995)) if values.size else 0.0
    return top if top > 0.0 else 1.0


def _heat_colours(values: np.ndarray) -> np.ndarray:
    """Colours `[..., 3]` uint8 for values in 0..1, on a perceptually uniform map that also prints in grey."""
    from matplotlib import colormaps

    return colormaps["inferno"](values, bytes=True)[..., :3]


def _pictures(example: Example, top: float) -> list[np.ndarray]:
    """Return input and reconstruction `[H, W]` and the heat map over the input `[H, W, 3]`, uint8."""
    grey = [
        np.rint(np.clip(np.nan_to_num(np.asarray(image, np.float64), nan=-1.0), -1.0, 1.0) * 127.5 + 127.5)
        for image in (example.input, example.reconstruction)
    ]
    heat = np.clip(np.nan_to_num(np.asarray(example.heat_map, np.float64), nan=0.0) / top, 0.0, 1.0)
    cover = np.minimum(1.0, 0.25 + 1.5 * heat)[..., None]
    overlay = cover * _heat_colours(heat) + (1.0 - cover) * 0.7 * grey[0][..., None]
    return [image.astype(np.uint8) for image in (*grey, overlay)]


def _encode(pixels: np.ndarray) -> bytes:
    """Encode `[H, W]` or `[H, W, 3]` uint8 as PNG, reduced to the page's limit."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((PICTURE_LIMIT, PICTURE_LIMIT))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _png(figure: "Figure", dpi: int = 200) -> bytes:
    """Draw a figure; the default resolution is about twice that of the page, for print."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _image(png: bytes, alt: str) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escape(alt)}">'


def _write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file beside its place, sync it and rename it, so that a reader sees the old one or the new one."""
    path = pathlib.Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)

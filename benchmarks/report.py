"""Render a benchmark's JSON as a table and a plot.

    pytest benchmarks/ --benchmark --benchmark-json=speed.json
    python benchmarks/report.py speed.json --plot speed.png

The table is Markdown. `device` is the time on the GPU of a call from a CUDA graph, warm and with a cold L2 cache;
`wall` is a call from Python up to the end of its work; GB/s are the bytes that must move at least (roofline.py) over
the cold device time, or over the wall time on a CPU; `speed-up` is against "batched", by warm device time where
there is one. Rows of the whole model are a table of their own: wall time of the fastest round, an image's share of it,
and `speed-up` and `memory` against the written-out baseline.
"""

import argparse
import itertools
import json
import math
import pathlib

BASELINES = ("batched", "baseline")
"""What a group's rows are compared with: an op's reference, and the whole model written out."""

KERNEL_COLUMNS = (
    ("device µs", "device_us"),
    ("cold L2 µs", "device_cold_us"),
    ("wall µs", "wall_us"),
    ("GB/s", "gb_per_s"),
    ("% of copy", "percent_of_copy"),
    ("peak MB", "peak_mb"),
)
MODEL_COLUMNS = (
    ("ms", "ms"),
    ("ms an image", "image_ms"),
    ("images/s", "images_per_s"),
    ("GFLOP an image", "gflop_per_image"),
    ("GFLOP/s", "gflop_per_s"),
    ("peak MB", "peak_mb"),
    ("papers' s", "papers_s"),
)


def rows_of(results: dict) -> list[dict]:
    """Return one row a benchmark from pytest-benchmark's JSON."""
    return [
        {**benchmark["extra_info"], "wall_us": 1e6 * benchmark["stats"]["median"]}
        for benchmark in results["benchmarks"]
        if "variant" in benchmark["extra_info"]
    ]


def group_of(row: dict) -> str:
    """Return the group whose rows compare; dtype and pass are an op's alone."""
    return " ".join(row[key] for key in ("op", "shape", "dtype", "pass") if key in row)


def _groups(rows: list[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(group_of(row), []).append(row)
    return groups


def _time(row: dict) -> float:
    """Return microseconds; of the whole model those of the fastest round, which other work disturbs least."""
    return 1e3 * row["ms"] if "ms" in row else row.get("device_us", row["wall_us"])


def _base(row: dict, members: list[dict]) -> dict | None:
    """Return the row of its group that `row` is compared with."""
    names = [row["against"]] if "against" in row else BASELINES
    return next((member for member in members if member["variant"] in names), None)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}"


def table(rows: list[dict]) -> str:
    """Return Markdown: a table of the kernels and one of the whole model, groups in the order of the rows."""
    kernels, models = ([row for row in rows if ("images_per_s" in row) is whole] for whole in (False, True))
    return "\n\n".join(_table(*part) for part in ((kernels, KERNEL_COLUMNS), (models, MODEL_COLUMNS)) if part[0])


def _table(rows: list[dict], columns: tuple[tuple[str, str], ...]) -> str:
    shown = [(title, key) for title, key in columns if any(key in row for row in rows)]
    ratios = ["speed-up"]
    if columns is MODEL_COLUMNS and any("peak_mb" in row for row in rows):
        ratios.append("memory")
    lines = [["group", "variant", *(title for title, _ in shown), *ratios]]
    for group, members in _groups(rows).items():
        for row in members:
            base = _base(row, members)
            # Where the baseline was timed in turn with the row, these times compare.
            base_time = 1e3 * row["baseline_ms"] if "baseline_ms" in row else base and _time(base)
            compared = [f"{base_time / _time(row):.2f}x" if base_time else ""]
            if "memory" in ratios:
                both = base is not None and "peak_mb" in base and "peak_mb" in row
                compared.append(f"{row['peak_mb'] / base['peak_mb']:.2f}x" if both else "")
            lines.append([group, row["variant"], *(_number(row.get(key)) for _, key in shown), *compared])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) + " |"
        for line in [lines[0], rule, *lines[1:]]
    )


def epoch_lines(rows: list[dict]) -> list[str]:
    """Return SimSID's seconds against SQUID's, of training and of inference, with the papers' beside them."""
    lines = []
    for group, members in _groups([row for row in rows if row["op"] == "epoch"]).items():
        found = {tuple(row["variant"].split(", ")): row for row in members}
        for method, variant in found:
            other = found.get(("SQUID", variant))
            if method != "SimSID" or other is None:
                continue
            ours, theirs, row = _time(found[method, variant]) / 1e6, _time(other) / 1e6, found[method, variant]
            papers = f"{row['papers_s']:.1f} s against {other['papers_s']:.1f} s"
            lines.append(
                f"{group}, {variant}: SimSID {_number(ours)} s against SQUID {_number(theirs)} s, {theirs / ours:.2f}x "
                f"as fast; the papers': {papers}, {other['papers_s'] / row['papers_s']:.2f}x"
            )
    return lines


def plot(rows: list[dict], path: pathlib.Path, title: str) -> None:
    """Draw one panel an op and pass, a bar a variant and shape, on a logarithmic axis of time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple, list[dict]] = {}
    for row in rows:
        panels.setdefault(tuple(row[key] for key in ("op", "dtype", "pass") if key in row), []).append(row)
    height = math.ceil(len(panels) / 2)
    figure, axes = pyplot.subplots(height, 2, figsize=(14, 3.6 * height), squeeze=False, layout="constrained")
    for axis, (panel, members) in itertools.zip_longest(axes.flat, panels.items(), fillvalue=(None, ())):
        if panel is None:
            axis.set_visible(False)
            continue
        shapes = list(dict.fromkeys(row["shape"] for row in members))
        variants = list(dict.fromkeys(row["variant"] for row in members))
        for place, variant in enumerate(variants):
            bars = [(shapes.index(row["shape"]), _time(row)) for row in members if row["variant"] == variant]
            width = 0.8 / len(variants)
            axis.bar([i + (place + 0.5) * width - 0.4 for i, _ in bars], [t for _, t in bars], width, label=variant)
        axis.set(title=", ".join(panel), xticks=range(len(shapes)), xticklabels=shapes, yscale="log")
        axis.set_ylabel("device µs" if "device_us" in members[0] else "wall µs")
        axis.legend(fontsize="x-small")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and draw the plot where asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=pathlib.Path, help="what --benchmark-json wrote")
    parser.add_argument("--plot", type=pathlib.Path, help="also draw a plot into this file (png, svg, pdf)")
    chosen = parser.parse_args(arguments)
    results = json.loads(chosen.results.read_text(encoding="utf-8"))
    machine = results["machine_info"]
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    title = f"{machine.get('device', machine['machine'])}: {versions}"
    rows = rows_of(results)
    print("\n".join([title, "", table(rows), *epoch_lines(rows)]))
    if chosen.plot is not None:
        plot(rows, chosen.plot, title)


if __name__ == "__main__":
    main()

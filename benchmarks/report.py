"""Render a benchmark's JSON as a table and a plot.

    pytest benchmarks/ --benchmark --benchmark-json=speed.json
    python benchmarks/report.py speed.json --plot speed.png

The table is Markdown. `device` is the time on the GPU of a call from a CUDA graph, warm and with a cold L2 cache;
`wall` is a call from Python up to the end of its work; GB/s are the bytes that must move at least (kernels/roofline.py)
over the cold device time, or over the wall time on a CPU; `speed-up` is against "batched", by warm device time where
there is one.
"""

import argparse
import itertools
import json
import math
import pathlib

BASELINE = "batched"
COLUMNS = (
    ("device µs", "device_us"),
    ("cold L2 µs", "device_cold_us"),
    ("wall µs", "wall_us"),
    ("GB/s", "gb_per_s"),
    ("% of copy", "percent_of_copy"),
    ("peak MB", "peak_mb"),
)


def rows_of(results: dict) -> list[dict]:
    """Return one row a benchmark from pytest-benchmark's JSON."""
    return [
        {**benchmark["extra_info"], "wall_us": 1e6 * benchmark["stats"]["median"]}
        for benchmark in results["benchmarks"]
        if "variant" in benchmark["extra_info"]
    ]


def group_of(row: dict) -> str:
    """Return the group whose rows compare."""
    return f"{row['op']} {row['shape']} {row['dtype']} {row['pass']}"


def _time(row: dict) -> float:
    return row.get("device_us", row["wall_us"])


def _number(value: float | None) -> str:
    if value is None:
        return ""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}"


def table(rows: list[dict]) -> str:
    """Return one Markdown table, groups in the order of the rows."""
    shown = [(title, key) for title, key in COLUMNS if any(key in row for row in rows)]
    lines = [["group", "variant", *(title for title, _ in shown), "speed-up"]]
    for group, members in itertools.groupby(rows, group_of):
        members = list(members)
        base = next((_time(row) for row in members if row["variant"] == BASELINE), None)
        for row in members:
            speedup = "" if base is None else f"{base / _time(row):.2f}x"
            lines.append([group, row["variant"], *(_number(row.get(key)) for _, key in shown), speedup])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) + " |"
        for line in [lines[0], rule, *lines[1:]]
    )


def plot(rows: list[dict], path: pathlib.Path, title: str) -> None:
    """Draw one panel an op and pass, a bar a variant and shape, on a logarithmic axis of time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple, list[dict]] = {}
    for row in rows:
        panels.setdefault((row["op"], row["dtype"], row["pass"]), []).append(row)
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
    print(f"{title}\n\n{table(rows_of(results))}")
    if chosen.plot is not None:
        plot(rows_of(results), chosen.plot, title)


if __name__ == "__main__":
    main()

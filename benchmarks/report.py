"""Render the JSON of a benchmark as tables and a plot.

    pytest benchmarks/ --benchmark --benchmark-json=speed.json
    python benchmarks/report.py speed.json --plot speed.png

The tables are Markdown; docs/performance.md explains the columns. Several JSON files of one machine can be given.
"""

import argparse
import itertools
import json
import math
import pathlib

REFERENCES = ("batched", "baseline")
"""What the rows of a group are compared with: the reference of an op, and the whole model written out."""

KERNEL_COLUMNS = (
    ("device µs", "device_us"),
    ("cold L2 µs", "cold_us"),
    ("wall µs", "wall_us"),
    ("± %", "spread"),
    ("GB/s", "gb_per_s"),
    ("% of copy", "percent_of_copy"),
    ("peak MB", "peak_mb"),
)
MODEL_COLUMNS = (
    ("ms", "ms"),
    ("± %", "spread"),
    ("ms per image", "image_ms"),
    ("images/s", "images_per_s"),
    ("GFLOP per image", "gflop_per_image"),
    ("GFLOP/s", "gflop_per_s"),
    ("peak MB", "peak_mb"),
    ("papers, s", "papers_s"),
)

MEMORY, ATTENTION, LAYER = "space_aware_memory", "neighbor_attention", "neighbor_attention_layer"
WINDOWS = "unfold + nn.MultiheadAttention"
FASTER = (
    *((MEMORY, shape, "loop over locations", 10.0) for shape in "BASQ"),
    *((MEMORY, shape, "batched", 3.0) for shape in "BASQ"),
    *((MEMORY, shape, "batched, torch.compile", 1.5) for shape in "BA"),
    *((MEMORY, "C", variant, 1.0) for variant in ("loop over locations", "batched", "batched, torch.compile")),
    (LAYER, "A", WINDOWS, 2.0),
    (ATTENTION, "A", "batched", 5.0),
)
"""Targets of the fused ops: op, shape, what it is compared with, and how many times faster forward and backward are.

Of float32 device time in CUDA graphs. Projections in cuBLAS take most of an attention layer whatever the op costs, so
the layer has a target of its own.
"""
BANDWIDTH = (("forward", 70.0), ("backward", 60.0))  # of the fused memory at B: percent of a copy, with a cold L2 cache
WHOLE_MODEL = (
    ("train_step", "simsid", 6.0),
    ("train_step", "fused, CUDA graph, bf16", 8.0),
    ("inference", "simsid", 10.0),
)
PEAK_MEMORY = 0.6  # of the baseline


def rows_of(results: dict) -> list[dict]:
    """Return the rows of all variants from the JSON of pytest-benchmark."""
    return [row for benchmark in results["benchmarks"] for row in benchmark["extra_info"].get("rows", [])]


def group_of(row: dict) -> str:
    """Return the name of the group whose rows compare."""
    return " ".join(row[key] for key in ("op", "shape", "dtype", "pass") if key in row)


def _groups(rows: list[dict]) -> dict[str, dict[str, dict]]:
    groups: dict[str, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault(group_of(row), {})[row["variant"]] = row
    return groups


def _time(row: dict) -> float:
    """Return microseconds: on the device, where they were measured there."""
    return 1e3 * row["ms"] if "ms" in row else row.get("device_us", row["wall_us"])


def _reference(row: dict, group: dict[str, dict]) -> dict | None:
    """Return the row of its group that `row` is compared with."""
    names = [row["against"]] if "against" in row else REFERENCES
    return next((group[name] for name in names if name in group), None)


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return ""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}"


def table(rows: list[dict]) -> str:
    """Return Markdown: a table of the ops and one of the whole model, groups in the order of the rows."""
    ops, models = ([row for row in rows if ("images_per_s" in row) is whole] for whole in (False, True))
    return "\n\n".join(_table(*part) for part in ((ops, KERNEL_COLUMNS), (models, MODEL_COLUMNS)) if part[0])


def _table(rows: list[dict], columns: tuple[tuple[str, str], ...]) -> str:
    shown = [(title, key) for title, key in columns if any(key in row for row in rows)]
    lines = [["group", "variant", *(title for title, _ in shown), "speed-up"]]
    with_memory = columns is MODEL_COLUMNS and any("peak_mb" in row for row in rows)
    if with_memory:
        lines[0].append("memory")
    for name, group in _groups(rows).items():
        for row in group.values():
            reference = _reference(row, group)
            compared = ["" if reference is None else f"{_time(reference) / _time(row):.2f}x"]
            if with_memory:
                both = reference is not None and "peak_mb" in reference and "peak_mb" in row
                compared.append(f"{row['peak_mb'] / reference['peak_mb']:.2f}x" if both else "")
            lines.append([name, row["variant"], *(_number(row.get(key)) for _, key in shown), *compared])
    return _markdown(lines, left=2)


def _markdown(lines: list[list[str]], left: int) -> str:
    """Return a table whose first `left` columns are aligned to the left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) + " |"
        for line in [lines[0], rule, *lines[1:]]
    )


def target_table(rows: list[dict]) -> str:
    """Return Markdown: every target that these rows can judge, or nothing without device times."""
    lines = [["target", "measured", "wanted", ""]]
    lines += [[*line[:3], "pass" if line[3] else "**miss**"] for line in (*_op_targets(rows), *_model_targets(rows))]
    return _markdown(lines, left=4) if len(lines) > 1 else ""


def _op_targets(rows: list[dict]) -> list[tuple[str, str, str, bool]]:
    device = [row for row in rows if "device_us" in row and row["dtype"] == "float32"]
    groups = {(row["op"], row["shape"], row["pass"], row["variant"]): row for row in device}
    judged = []
    for op, shape, variant, least in FASTER:
        other, fused = (groups.get((op, shape, "both", name)) for name in (variant, "fused"))
        if other is not None and fused is not None:
            ratio = other["device_us"] / fused["device_us"]
            text = f"{ratio:.2f}x ({other['device_us']:.1f} µs against {fused['device_us']:.1f} µs)"
            judged.append((f"{op} {shape}, against {variant}", text, f"at least {least:g}x", ratio >= least))
    for which, least in BANDWIDTH:
        row = groups.get((MEMORY, "B", which, "fused"))
        if row is not None:
            percent = row["percent_of_copy"]
            name = f"{MEMORY} B, {which}, bandwidth"
            judged.append((name, f"{percent:.0f} % of a copy", f"at least {least:.0f} %", percent >= least))
    return judged


def _model_targets(rows: list[dict]) -> list[tuple[str, str, str, bool]]:
    judged = []
    measured = [row for row in rows if "peak_mb" in row and row["op"] in ("train_step", "inference")]
    for name, group in _groups(measured).items():
        baseline = group.get("baseline")
        for op, variant, least in WHOLE_MODEL:
            row = group.get(variant)
            if baseline is None or row is None or row["op"] != op:
                continue
            ratio, memory = baseline["ms"] / row["ms"], row["peak_mb"] / baseline["peak_mb"]
            text = f"{ratio:.2f}x ({baseline['ms']:.2f} ms against {row['ms']:.2f} ms)"
            judged.append((f"{name}, {variant}", text, f"at least {least:g}x", ratio >= least))
            if variant == "simsid":
                text = f"{memory:.2f} ({row['peak_mb']:.0f} MB against {baseline['peak_mb']:.0f} MB)"
                judged.append((f"{name}, peak memory", text, f"at most {PEAK_MEMORY}", memory <= PEAK_MEMORY))
    return judged


def epoch_lines(rows: list[dict]) -> list[str]:
    """Return the seconds of SimSID against those of SQUID, for training and inference, beside those of the papers."""
    lines = []
    for name, group in _groups([row for row in rows if row["op"] == "epoch"]).items():
        for variant in ("baseline", "simsid"):
            ours, theirs = (group.get(f"{method}, {variant}") for method in ("SimSID", "SQUID"))
            if ours is None or theirs is None:
                continue
            mine, other = _time(ours) / 1e6, _time(theirs) / 1e6
            papers = f"{ours['papers_s']:.1f} s against {theirs['papers_s']:.1f} s"
            lines.append(
                f"{name}, {variant}: SimSID {_number(mine)} s against SQUID {_number(other)} s, {other / mine:.2f}x "
                f"as fast; in the papers {papers}, {theirs['papers_s'] / ours['papers_s']:.2f}x"
            )
    return lines


def plot(rows: list[dict], path: pathlib.Path, title: str) -> None:
    """Draw one panel per op and pass, a bar per variant and shape, on a logarithmic axis of time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple, list[dict]] = {}
    for row in rows:
        panels.setdefault(tuple(row[key] for key in ("op", "dtype", "pass") if key in row), []).append(row)
    height = math.ceil(len(panels) / 2)
    figure, axes = pyplot.subplots(height, 2, figsize=(14, 3.6 * height), squeeze=False, layout="constrained")
    for axis, (panel, shown) in itertools.zip_longest(axes.flat, panels.items(), fillvalue=(None, ())):
        if panel is None:
            axis.set_visible(False)
            continue
        shapes = list(dict.fromkeys(row["shape"] for row in shown))
        variants = list(dict.fromkeys(row["variant"] for row in shown))
        width = 0.8 / len(variants)
        for number, variant in enumerate(variants):
            bars = [(shapes.index(row["shape"]), _time(row)) for row in shown if row["variant"] == variant]
            left = [i + (number + 0.5) * width - 0.4 for i, _ in bars]
            axis.bar(left, [microseconds for _, microseconds in bars], width, label=variant)
        axis.set(title=", ".join(panel), xticks=range(len(shapes)), xticklabels=shapes, yscale="log")
        axis.set_ylabel("device µs" if "device_us" in shown[0] else "wall µs")
        axis.legend(fontsize="x-small")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, and draw the plot where `--plot` asks for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=pathlib.Path, nargs="+", help="what --benchmark-json wrote")
    parser.add_argument("--plot", type=pathlib.Path, help="also draw a plot into this file (png, svg, pdf)")
    options = parser.parse_args(arguments)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
    titles = []
    for machine in (result["machine_info"] for result in results):
        versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
        titles.append(f"{machine['device']}: {versions}")
    if len(set(titles)) > 1:
        parser.error(f"the results must be of one machine and its versions, got {'; '.join(dict.fromkeys(titles))}")
    rows = [row for result in results for row in rows_of(result)]
    blocks = [titles[0], table(rows), target_table(rows), "\n".join(epoch_lines(rows))]
    print("\n\n".join(filter(None, blocks)))
    if options.plot is not None:
        plot(rows, options.plot, titles[0])


if __name__ == "__main__":
    main()

"""The committed results of studies: their commands can be given, and their tables say what their measurements say."""

import json
import re
import shlex
import sys

import documents
import numpy as np
import pytest
import tiny

from simsid.commands import main as command_line
from simsid.study import STUDIES

sys.path.append(str(documents.ROOT / "benchmarks"))

import report

RESULTS = documents.ROOT / "benchmarks" / "results" / "h200"
FOLDER = documents.ROOT / "docs" / "results"
NAMES = sorted(path.stem for path in FOLDER.glob("*.md"))


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_every_study_was_run_on_the_default_data_and_two_on_radiographs():
    assert {name.removeprefix("digits-") for name in NAMES if name.startswith("digits-")} == set(STUDIES)
    assert {"zhanglab-components", "zhanglab-methods"} <= set(NAMES)
    linked = documents.PAGES["docs/results.md"]
    assert all(f"(results/{name}.md)" in linked for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_table_says_what_was_measured_and_how(name):
    page = (FOLDER / f"{name}.md").read_text("utf-8")
    (block,) = re.findall(r"^```bash\n(.*?)^```", page, re.S | re.M)
    command = command_line._parse(shlex.split(block)[1:])
    study = STUDIES[command.name]
    assert name == ("zhanglab" if command.data else "digits") + "-" + command.name
    assert page.startswith(f"# {command.name}: {study.title}\n") and f"]({name}.png)" in page
    assert (FOLDER / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    lines = page.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| model |"))
    head, *rows = (cells_of(line) for line in [lines[start], *lines[start + 2 :]] if line.startswith("|"))
    measured = tiny.rows(FOLDER / f"{name}.csv")
    rows = rows[: next((i for i, row in enumerate(rows) if row[0] == "AUC of"), len(rows))]
    assert rows and {row[0] for row in rows} == {row["model"] for row in measured}
    assert {row[0] for row in rows} <= {cell.label for cell in study.cells}
    for row in rows:
        values = [float(entry["auc"]) for entry in measured if entry["model"] == row[0] and entry["own"] == "1"]
        assert row[head.index("AUC")].startswith(f"{np.mean(values):.3f}")
        assert ("±" in row[head.index("AUC")]) == (len(values) > 1)


def test_figures_of_a_gpu_in_the_documents_are_those_of_the_result_files():
    rows = [
        row for path in sorted(RESULTS.glob("*.json")) for row in report.rows_of(json.loads(path.read_text("utf-8")))
    ]
    page, readme = documents.PAGES["docs/performance.md"], documents.README

    def microseconds(op, shape, which):
        found = (row for row in rows if (row["op"], row.get("shape"), row.get("pass")) == (op, shape, which))
        return {row["variant"]: row["device_us"] for row in found}

    memory, attention = microseconds(report.MEMORY, "B", "both"), microseconds(report.ATTENTION, "A", "both")
    for of, digits in ((memory, 0), (attention, 1)):
        fused, loop = of["fused"], of["loop over locations"]
        assert f"**{fused:.{digits}f} µs** | {loop:,.0f}, {loop / fused:.3g}x" in page
        assert f"| {fused:.{digits}f} µs | {of['batched']:.0f} µs, {of['batched'] / fused:.2g}x" in readme
    step = {row["variant"]: row["ms"] for row in rows if row["op"] == "train_step"}
    cells_of_step = (f"{step['baseline']:.0f} ms", *(f"{step[name]:.1f}" for name in ("eager", "fused")))
    assert (
        " | ".join(cells_of_step) + f" | **{step['simsid']:.1f} ms** | **{step['baseline'] / step['simsid']:.2g}x**"
        in page
    )

"""The committed results of studies: their commands can be given, and their tables say what their measurements say."""

import re
import shlex

import documents
import numpy as np
import pytest
import tiny

from simsid.commands import main as command_line
from simsid.study import STUDIES

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

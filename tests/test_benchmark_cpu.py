"""The comparison of a CPU's seconds that docs/performance.md shows."""

import functools
import pathlib
import sys

import pytest
import tiny

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import cpu
import models


@pytest.mark.parametrize(("work", "alone"), [("scoring", 1), ("folder", 1), ("training", 0)])
def test_every_variant_gets_a_row(work, alone, capsys, monkeypatch):
    monkeypatch.setattr(models, "IMAGE_SIZE", (60, 50))
    monkeypatch.setattr(models, "METHODS", {"SimSID": functools.partial(tiny.config, **tiny.ONE_LEVEL)})
    monkeypatch.setattr(sys, "argv", ["cpu.py", "--width", "4", "--rounds", "1", "--work", work])
    cpu.main()
    rows = capsys.readouterr().out.splitlines()[3:]
    names = [row.split("|")[1].strip() for row in rows]
    assert names == [f"{work}: {name}" for name in [*cpu.VARIANTS, *["baseline, batch 1"] * alone]]
    assert all(float(row.split("|")[2]) >= 0 for row in rows) and "1.00x" in rows[0]

"""The comparison of precisions that docs/performance.md shows."""

import runpy

import documents
import tiny

from simsid.data import ImageSet, Record, as_image_set

CHOICES = [
    "--seeds",
    "0",
    "--precisions",
    "float32",
    "--data-seed",
    "3",
    "--model",
    "items=5",
    "--training",
    "batch_size=8",
]


def test_comparison_trains_every_seed_in_both_precisions_and_prints_a_row_each(capsys, monkeypatch):
    names = runpy.run_path(str(documents.ROOT / "docs" / "compare_training.py"))
    labeled = ImageSet(tiny.images(6, 1), tuple(Record(f"{i}", label=i % 2) for i in range(6)))
    parts = as_image_set(tiny.images(32), label=0), as_image_set(tiny.images(4, 2), label=0), labeled
    made, seeds = [], []
    variables = names["main"].__globals__
    monkeypatch.setitem(variables, "images", lambda source, count, config, seed: seeds.append(seed) or parts)
    real = names["seeded_model"]
    monkeypatch.setitem(variables, "seeded_model", lambda *values: made.append(real(*values)) or made[-1])
    config = {"image_size": 48, "patches": 2, "levels": 2, "heads": 2}
    monkeypatch.setattr(names["Config"], "digit_anatomy", names["Config"].digit_anatomy(**config).replace)
    names["main"](["digits", "--seeds", "0", "1", "--epochs", "2", "--width", "4"])
    head, _, *rows = tiny.cells(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [[str(seed), name] for seed in (0, 1) for name in names["PRECISIONS"]]
    assert all(len(row) == len(head) and len(row[2].split(", ")) == 2 for row in rows)
    names["main"](["digits", "--epochs", "1", "--width", "4", *CHOICES])
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert made[-1].config.items == 5 and seeds == [0, 3]
    assert rows[0][2] != rows[1][2], "bfloat16 rounds, so that losses of equal digits were computed in float32"

"""The comparison of criteria and kinds of decay that docs/training.md shows."""

import re
import runpy

import documents
import pytest
import tiny

from simsid.data import ImageSet, Record, as_image_set

SCRIPT = documents.ROOT / "docs" / "compare_epochs.py"


@pytest.fixture
def names():
    return runpy.run_path(str(SCRIPT))


def test_comparison_trains_every_decay_and_prints_both_tables(names, capsys, monkeypatch):
    train = as_image_set(tiny.images(8), label=0)
    val = ImageSet(tiny.images(6, 1), tuple(Record(f"{i}", label=i % 2) for i in range(6)))
    config = {"image_size": 48, "patches": 2, "levels": 2, "heads": 2, "signal": "residual"}
    monkeypatch.setitem(names["main"].__globals__, "images", lambda source, count: (train, val, config))
    names["main"](["digits", "--seeds", "1", "--epochs", "2"])
    criteria, decays = capsys.readouterr().out.strip().split("\n\n")
    assert [row.split("`")[1] for row in criteria.splitlines()[2:]] == list(names["CRITERIA"])
    assert [row.split("`")[1] for row in decays.splitlines()[2:]] == list(names["DECAYS"])


def test_each_criterion_keeps_its_own_epoch(names):
    def epoch(number, auc, synthetic, reconstruction, distance):
        metrics = {"val_auc_residual": auc, "val_synthetic_residual": synthetic, "val_auc_memory_distance": 0.5}
        return metrics | {
            "epoch": number,
            "val_reconstruction": reconstruction,
            "val_memory_distance": distance,
        }

    runs = [[epoch(0, 0.6, 0.5, 3, 1), epoch(1, 0.9, 0.6, 2, 3), epoch(2, 0.8, 0.9, 1, 2), epoch(3, 0.7, 0.8, 4, 4)]]
    kept = {row.split("`")[1]: row.split("|")[2:4] for row in names["criteria_table"](runs, "residual")[2:]}
    expected = {"auc": 2, "reconstruction": 3, "memory_distance": 1, "synthetic": 3, "last": 4}
    assert {name: int(cells[0]) for name, cells in kept.items()} == expected
    assert [float(cells[1]) for cells in kept.values()] == [0.9, 0.8, 0.6, 0.8, 0.7]


def test_tables_of_the_page_have_the_rows_of_the_comparison(names):
    page = documents.PAGES["docs/training.md"]
    listed = re.findall(r"^\| `(\w+)` \| ", page.split("## Which epoch is kept")[1].split("## In Python")[0], re.M)
    assert listed[: len(names["CRITERIA"])] == list(names["CRITERIA"])
    assert all(name in listed for name in names["DECAYS"])

"""The comparison of standardized signals that docs/results.md shows."""

import runpy

import documents
import numpy as np
import pytest
import tiny
import torch

from simsid import metrics
from simsid.data import ImageSet, Record, as_image_set

FIELDS = {"image_size": 48, "patches": 2, "levels": 2, "heads": 2, "width": 4, "items": 6, "decoder_items": 6}


@pytest.fixture
def script(monkeypatch):
    names = runpy.run_path(str(documents.ROOT / "docs" / "compare_signals.py"))
    val = ImageSet(tiny.images(6, 1), tuple(Record(f"{i}", label=i % 2) for i in range(6)))
    parts = (as_image_set(tiny.images(8), label=0), as_image_set(tiny.images(5, 2), label=0), val)
    own = names["main"].__globals__
    monkeypatch.setitem(own, "FIELDS", FIELDS)
    monkeypatch.setitem(own, "images", lambda *_: parts)
    return own, parts


def test_comparison_prints_every_signal(script, capsys):
    own, _ = script
    own["main"](["chest_xray", "--seeds", "1", "--epochs", "1"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    labels = [row[0].strip("| ") for row in rows]
    assert labels[:2] == ["residual", "memory distance, in-painting block"] and "`discriminator_per_image`" in labels
    assert {"in-painting error", "memory distance, decoder level 2", "distance to the teacher, level 2"} <= set(labels)
    assert all(len(row[1].split()) == 1 for row in rows)


def test_location_is_compared_with_the_same_location_of_held_out_images(script):
    own, (_, held, val) = script
    model = tiny.model(**FIELDS).eval()
    normal, found = (
        torch.cat([own["location_values"](model, batch)["residual"] for batch in part.batches(16)]).double().numpy()
        for part in (held, val)
    )
    assert normal.shape == (5, 256)
    z = (found - normal.mean(0)) / normal.std(0)
    want = metrics.auc(val.labels, np.square(z).mean(1)).value
    assert own["areas"](model, held, val)["residual"][2] == pytest.approx(want)

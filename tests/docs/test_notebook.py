"""The notebook runs from top to bottom, as a script runs it."""

import runpy

import documents
import matplotlib
import pytest
import torch

NOTEBOOK = documents.ROOT / "docs" / "notebook.py"


@pytest.mark.filterwarnings("error::UserWarning")
def test_notebook_trains_scores_looks_and_calibrates_without_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    with torch.random.fork_rng():
        names = runpy.run_path(str(NOTEBOOK))
    names["plt"].close("all")
    printed = capsys.readouterr().out
    assert len(names["history"].epochs) == 2 and "focal_residual" in printed and "items are dead" in printed
    scores, labels = names["scores"], names["films"].labels
    assert scores[labels == 1].min() > scores[labels == 0].median()
    assert (names["low"], names["high"]) == pytest.approx((0.0042, 0.4593), abs=1e-4)
    assert (tmp_path / "calibrated" / "model.json").is_file()


def test_notebook_is_made_of_cells_with_text_between_them():
    cells = NOTEBOOK.read_text("utf-8").split("# %%")[1:]
    heads = [line for cell in cells for line in cell.splitlines() if line.startswith("# ## ")]
    assert heads == ["# ## Train", "# ## Score", "# ## Look", "# ## Radiographs", "# ## Calibrate"]
    assert any("docs/notebook.py" in text for text in documents.PAGES.values()), "no page leads to the notebook"

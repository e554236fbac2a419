"""`simsid demo`: trains, reports and replaces nothing but an earlier demo."""

import json
import re

import pytest
import tiny

from simsid import Model, Trainer
from simsid.commands import demo
from simsid.commands import main as command_line


@pytest.fixture(autouse=True)
def few_images(monkeypatch, one_figure):
    tiny.shrink_demo(monkeypatch)


def test_demo_trains_prints_every_signal_and_writes_a_report(simsid, tmp_path):
    done = simsid("demo", "--epochs", "1", "--images", "32", "-o", tmp_path / "demo")
    assert done.code == 0, done.err
    for finding in ("all abnormal", "missing", "misordered", "flipped", "zero"):
        assert re.search(rf"\b{finding}\b.* 0\.\d\d\d", done.out), finding
    for signal in tiny.model().signal_names:
        assert signal in done.out
    page = tiny.assert_self_contained(tmp_path / "demo" / "report.html")
    assert "misordered" in page.lower() and "esearch use only" in page
    assert Model.load(tmp_path / "demo").config.signal == "focal_residual"
    assert len(tiny.metrics(tmp_path / "demo")) == 1
    training = json.loads((tmp_path / "demo" / "run.json").read_text())["training"]
    assert training["translate"] == training["scale"] == 0, "grids have their cells in the same places"


def test_demo_refuses_a_folder_with_other_files_or_another_run(simsid, tmp_path):
    for folder, name, content in (("mine", "thesis.tex", "years"), ("run", "run.json", '{"command": "train"}')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(content)
        refused = simsid("demo", "-o", folder)
        assert refused.code == 2 and "choose another folder with -o" in refused.err
        assert [path.name for path in (tmp_path / folder).iterdir()] == [name]


def test_a_demo_replaces_an_earlier_one(tmp_path, monkeypatch):
    class Stop(RuntimeError):
        pass

    def fit(self, *_):
        assert not self.run.started
        raise Stop

    monkeypatch.setattr(Trainer, "fit", fit)
    monkeypatch.setattr(demo, "score_samples", lambda output: output.mkdir() or "")
    tiny.calibrated(tmp_path / "demo")
    (tmp_path / "demo" / "run.json").write_text('{"command": "demo"}')
    for name in ("last.json", "report.html", ".lock", ".run.json.x1"):
        (tmp_path / "demo" / name).write_text("{}")
    for _ in range(2):
        with pytest.raises(Stop):
            command_line.main(["demo", "-o", str(tmp_path / "demo"), "--images", "8", "--threads", "1"])
        assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [".lock", "radiographs", "run.json"]

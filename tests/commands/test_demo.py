"""`simsid demo`: trains, reports and replaces nothing but an earlier demo."""

import re

import pytest
import tiny

from simsid import Model, Trainer
from simsid.commands import main as command_line


def test_demo(simsid, tmp_path):
    done = simsid("demo", "--epochs", "1", "--images", "32", "-o", tmp_path / "demo")
    assert done.code == 0, done.err
    for kind in ("all abnormal", "missing", "misordered", "flipped", "zero"):
        assert re.search(rf"\b{kind}\b.* 0\.\d\d\d", done.out), kind
    for signal in tiny.model().signal_names:
        assert signal in done.out
    page = tiny.assert_self_contained(tmp_path / "demo" / "report.html")
    assert "misordered" in page.lower() and "esearch use only" in page
    assert Model.load(tmp_path / "demo").config.signal == "focal_residual"
    assert len(tiny.metrics(tmp_path / "demo")) == 1

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    for folder in ("mine", "demo/run"):
        (tmp_path / "demo" / "run").mkdir(exist_ok=True)
        (tmp_path / "demo" / "run" / "run.json").write_text('{"command": "train"}')
        refused = simsid("demo", "-o", tmp_path / folder)
        assert refused.code == 2 and "choose another folder with -o" in refused.err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_demo_replaces_the_one_before(simsid, tmp_path, monkeypatch):
    class Stop(RuntimeError):
        pass

    def fit(self, *_):
        assert not self.run.started
        raise Stop

    monkeypatch.setattr(Trainer, "fit", fit)
    tiny.calibrated(tmp_path / "demo")
    (tmp_path / "demo" / "run.json").write_text('{"command": "demo"}')
    for name in ("last.json", "report.html", ".lock", ".run.json.x1"):
        (tmp_path / "demo" / name).write_text("{}")
    for _ in range(2):
        with pytest.raises(Stop):
            command_line.main(["demo", "-o", str(tmp_path / "demo"), "--images", "8"])
        assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [".lock", "run.json"]

"""The README's code, run as it stands, and its commands against the command line."""

import pathlib
import re

import numpy as np
import pytest
import tiny
from PIL import Image

from simsid.commands.main import COMMANDS

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture
def chest_xray(tmp_path, monkeypatch):
    """ZhangLab's layout with a few small films, in the current folder."""
    rng = np.random.default_rng(0)
    for split, finding, count in (("train", "NORMAL", 4), ("val", "NORMAL", 4), ("val", "PNEUMONIA", 4)):
        folder = tmp_path / "chest_xray" / split / finding
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (140, 150), np.uint8)).save(folder / f"IM-{i:04d}-0001.jpeg")
    monkeypatch.chdir(tmp_path)


def test_python_examples_run(chest_xray, capsys):
    training, ops, _ = blocks("python")
    assert "epochs=60" in training
    shared: dict[str, object] = {}
    exec(training.replace("epochs=60", "epochs=1"), shared)
    assert shared["model"].calibration is not None
    assert "torch.Size([8, 1, 128, 128])" in capsys.readouterr().out
    exec(ops, shared)
    assert shared["mixed"].shape == (16, 16, 512)


def test_the_picture_is_drawn_as_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.calibrated("simsid-demo")
    exec(blocks("python")[2], {})
    with Image.open("demo.png") as drawn, Image.open(ROOT / "docs" / "demo.png") as shown:
        assert drawn.size == shown.size


def test_commands_exist():
    named = set(re.findall(r"simsid (\w+)", "\n".join(re.findall(r"^\| `(.*?)` \|", README, re.M))))
    assert named == set(COMMANDS)


def test_ci_runs_the_readme_test_command():
    line = "pip install -c constraints.txt -e '.[test]' && pytest"
    assert README.count(line) == 1
    assert line.split(" && ")[0] in (ROOT / ".ci/run").read_text("utf-8")

"""`simsid study`: every study runs, and bad requests get one sentence."""

import re
import signal

import pytest
import tiny

from simsid.commands.study import NAMES
from simsid.study import STUDIES, images, plan
from simsid.training import TrainingStep

ONE = {
    "components": "no_skip",
    "squid_components": "memory_matrix",
    "patches": "P = 2",
    "topk": "k = 10",
    "items": "N = 50",
    "mixed": "simsid 50 %",
    "contamination": "feature_knn 80 %",
    "methods": "pixel_pca",
    "decay": "except_items",
    "speed": "squid",
}
"""One model of each study, which runs in a test; all of them are built in tests/study."""


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(images, "DIGITS", {"train": 16, "val": 4, "test_normal": 5, "test_anomalous": 4})
    geometry = {"image_size": 48, "patches": 3, "levels": 2}
    monkeypatch.setattr(plan, "DIGIT_GEOMETRY", {**plan.DIGIT_GEOMETRY, **geometry})


def test_names_of_the_command_are_those_of_the_table():
    assert tuple(STUDIES) == NAMES == tuple(ONE)


@pytest.mark.parametrize("name", NAMES)
def test_a_study_trains_evaluates_prints_and_writes(simsid, small, tmp_path, name):
    done = simsid("study", name, "--only", ONE[name], "--width", "4", "--epochs", "1", "--threads", "1")
    assert done.code == 0, done.err
    folder = tmp_path / "studies" / f"{name}-DigitAnatomy"
    assert done.out.startswith(f"{name}: {STUDIES[name].title}\n")
    assert f"table, figure and runs: {folder.relative_to(tmp_path)}" in done.out
    assert re.search(rf"^{re.escape(ONE[name])} +\w+ +[01]\.\d{{3}} ", done.out, re.M)
    page = (folder / "table.md").read_text("utf-8")
    assert f"| {ONE[name]} |" in page and "optimistic" in page
    assert {row["model"] for row in tiny.rows(folder / "results.csv")} == {ONE[name]}
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "reconstructions.png").exists() == (name == "methods")
    (run,) = folder.glob("*/seed-0")
    assert {"run.json", "manifest.csv", "model.json", "result.json"} <= {path.name for path in run.iterdir()}


def test_a_study_of_a_folder_shows_the_papers_figure_beside_ours(simsid, zhanglab, tmp_path):
    done = simsid(
        "study", "methods", "--data", zhanglab, "--only", "pixel_knn", "simsid", "--width", "4", "--epochs", "1",
        "--threads", "1", "--images", "4", "-o", "out",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert re.search(r"^simsid +0\.911 +discriminator_per_image +[01]\.\d{3} ", done.out, re.M)
    assert "chest_xray: 4 training images; evaluated on 3 normal and 3 abnormal test images; 1 seed." in done.out
    assert "paper: on ZhangLab's official test set" in done.out


def test_ctrl_c_leaves_a_study_that_the_same_command_resumes(simsid, small, monkeypatch):
    step, line = TrainingStep.__call__, ["study", "speed", "--only", "simsid", "--width", "4", "--epochs", "2"]

    def interrupted(self, batch, number):
        if number == 0:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, number)

    monkeypatch.setattr(TrainingStep, "__call__", interrupted)
    stopped = simsid(*line, "--threads", "1")
    assert stopped.code == 130 and "the same command resumes the study" in stopped.err
    monkeypatch.setattr(TrainingStep, "__call__", step)
    assert simsid(*line, "--threads", "1").code == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("speed --only nothing", "only must match a model of the study, got nothing; they are simsid, squid"),
        ("speed --seeds 0", "seeds must be at least 1, got 0"),
        ("speed --epochs 0", "epochs must be at least 1, got 0"),
        ("speed --criterion best", "criterion must be one of 'auto', 'auc', "),
        ("speed --budget 0", "budget must be a positive number of minutes, got 0"),
        (
            "speed --budget 5 --width 8",
            "a budget picks width and epochs; give either --budget, or --width and --epochs",
        ),
        ("speed --data nowhere", "nowhere does not exist"),
        ("mixed --data FILMS", "evaluation needs"),
        ("speed --data FILMS -o FILMS/out", "the output must lie outside the folder of images"),
        ("speed --width 2000", "width must be at most 1024, got 2000"),
    ],
)
def test_bad_requests_get_one_sentence(simsid, small, films, line, message):
    done = simsid("study", *line.replace("FILMS", str(films)).split(), "--threads", "1")
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err


def test_an_unknown_study_lists_the_known_ones(simsid):
    done = simsid("study", "everything")
    assert done.code == 2 and all(name in done.err for name in NAMES)

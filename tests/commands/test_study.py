"""`simsid study`: every study runs, and bad requests get one sentence."""

import re
import signal

import pytest
import tiny
import torch

from simsid import checkpoint
from simsid.commands.report import run_images
from simsid.commands.study import NAMES
from simsid.models import PixelKNN
from simsid.study import STUDIES, images, plan
from simsid.training import TrainingStep
from simsid.training.run_folder import RunFolder

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


def test_a_model_of_a_study_is_reported_on_its_drawn_images(simsid, small, tmp_path):
    assert simsid("study", "methods", "--only", "pixel_pca", "--threads", "1", "-o", "out").code == 0
    run = tmp_path / "out" / "pixel_pca" / "seed-0"
    done = simsid("report", run)
    assert done.code == 0, done.err
    page = (run / "memory" / "report.html").read_text("utf-8")
    assert "AUC by finding" in page and "This model has no memory" in page
    for folder in (tmp_path / "out", run.parent):
        refused = simsid("report", folder)
        assert refused.code == 2 and f"it holds 1 of a study; give one, such as {run}" in refused.err
    run.rename(tmp_path / "moved")
    assert "moved lies outside of its study" in simsid("report", "moved").err


@pytest.mark.parametrize(("name", "share"), [("mixed", 0.5), ("mixed", 1.0), ("topk", 1.0)])
def test_images_of_a_studys_run_are_drawn_again_as_they_were(small, tmp_path, name, share):
    run = tmp_path / "cell" / "seed-3"
    model = PixelKNN(image_size=48)
    drawn = images.StudyImages(None, most=8, contaminated=name == "mixed").train(model.preprocessing, share, seed=3)
    with RunFolder(run) as folder:
        folder.write_request({"command": "study", "train": 8, "normal_share": share, "seed": 3})
        folder.write_manifest(drawn)
    checkpoint.write_json(tmp_path / "study.json", {"study": name})
    train, val = run_images(run, model, 1)
    assert torch.equal(train.pixels, drawn.pixels) and train.records == drawn.records
    assert sorted(val.labels) == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("pattern", "labels"),
    [("k = 1", ["k = 1"]), ("k_1", ["k = 1"]), ("k_1*", ["k = 1", "k = 10"]), ("k ? 1", ["k = 1"])],
)
def test_a_pattern_matches_the_name_in_the_table_or_that_of_the_folder(simsid, small, monkeypatch, pattern, labels):
    class Stop(RuntimeError):
        pass

    def stopped(*arguments):
        assert [cell.label for cell in arguments[-1]] == labels
        raise Stop

    monkeypatch.setattr("simsid.study.StudyRun", stopped)
    with pytest.raises(Stop):
        simsid("study", "topk", "--only", pattern)


def test_the_images_of_a_study_do_not_depend_on_the_models_that_are_run(simsid, small, monkeypatch):
    asked = []
    monkeypatch.setattr("simsid.study.StudyImages", lambda *_, **options: asked.append(options["contaminated"]))
    for cell in ("simsid 100 %", "simsid 50 %"):
        with pytest.raises(AttributeError):  # no images
            simsid("study", "mixed", "--only", cell)
    assert asked == [True, True]


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
        ("speed --only", "--only needs at least one pattern, got none"),
        ("speed --only --width 4", "--only needs at least one pattern, got none"),
        ("speed --exclude -o out", "--exclude needs at least one pattern, got none"),
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

"""A study's cells: finished ones are read, a killed one resumes, another request is refused."""

import dataclasses
import json

import pytest
import tiny

from simsid import checkpoint
from simsid.errors import CheckpointError, RunError
from simsid.study import Cell, Plan, Study, StudyImages, StudyRun, cells
from simsid.study import plan as plan_module
from simsid.training import TrainingStep

pytestmark = pytest.mark.usefixtures("small")

STUDY = Study("two models", (Cell("full model", training={"checkpoint_seconds": 0}), Cell("pixel_knn", "pixel_knn")))


@pytest.fixture
def start(tmp_path):
    """Start the study in a folder, with other values of its fields."""
    lines = []

    def run(folder="study", **changes):
        values = {"name": "own", "study": STUDY, "seeds": 1, "plan": Plan(4, 2), "minutes": None, "criterion": "auto"}
        values = {"images": StudyImages(None), **values, **changes}
        return StudyRun(folder=tmp_path / folder, device="cpu", report=lines.append, **values).run()

    run.lines = lines
    return run


def named(name):
    images = StudyImages(None)
    images.name = name
    return images


@pytest.fixture
def started(start):
    """The same after the network alone was trained for one epoch, in `text`."""

    def run(**changes):
        return start(**{"plan": Plan(4, 1), **changes})

    run.text = run(only=STUDY.cells[:1])
    return run


def test_a_killed_training_resumes_and_finished_cells_are_read(start, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    step = TrainingStep.__call__

    def killed(self, images, number):
        if number == 1:
            raise Killed
        return step(self, images, number)

    monkeypatch.setattr(TrainingStep, "__call__", killed)
    with pytest.raises(Killed):
        start()
    knn, trained = (tmp_path / "study" / name / "seed-0" for name in ("pixel_knn", "full_model"))
    assert (knn / cells.RESULT).exists() and not (trained / cells.RESULT).exists()
    assert (trained / "last.json").exists(), "nothing to resume"
    monkeypatch.setattr(TrainingStep, "__call__", step)
    before = (knn / cells.RESULT).stat().st_mtime_ns
    text = start()
    assert "full model" in text and (knn / cells.RESULT).stat().st_mtime_ns == before
    start("uninterrupted")
    tiny.assert_same_run(trained, tmp_path / "uninterrupted" / "full_model" / "seed-0")

    # All of it is finished now: nothing is trained, and further seeds are added to it.
    with monkeypatch.context() as nothing_is_trained:
        nothing_is_trained.setattr(cells, "Trainer", None)
        assert start() == text
    assert "±" in start(seeds=2)
    written = tiny.rows(tmp_path / "study" / "results.csv")
    assert {(row["model"], row["seed"]) for row in written} == {
        (name, seed) for name in ("full model", "pixel_knn") for seed in "01"
    }
    assert sum(row["own"] == "1" for row in written) == 4


def test_a_fitted_model_without_a_result_is_evaluated_and_not_fitted_again(start, tmp_path, monkeypatch):
    only = dataclasses.replace(STUDY, cells=STUDY.cells[1:])
    start(study=only)
    (tmp_path / "study" / "pixel_knn" / "seed-0" / cells.RESULT).unlink()
    monkeypatch.setattr(cells, "fit_in_folder", None)
    assert "pixel_knn" in start(study=only)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": Plan(8, 1)}, "model setting width: expected 8, got 4"),
        ({"plan": Plan(4, 3)}, "training setting epochs: expected 3, got 1"),
        ({"plan": None, "minutes": 5.0}, "budget: expected 5.0, got None"),
        ({"criterion": "last"}, "criterion: expected 'last', got 'auto'"),
        ({"images": lambda: StudyImages(None, most=9)}, "number of training images: expected 9, got 16"),
        ({"images": lambda: named("chest_xray")}, "data set: expected 'chest_xray', got 'DigitAnatomy'"),
        ({"name": "patches"}, "study: expected 'patches', got 'own'"),
    ],
    ids=["width", "epochs", "budget", "criterion", "images", "data set", "study"],
)
def test_another_request_is_refused_by_its_setting_before_anything_is_written(started, tmp_path, changes, message):
    run, folder = started, tmp_path / "study"
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    with pytest.raises(RunError) as refused:
        run(**{name: value() if callable(value) else value for name, value in changes.items()})
    assert f"with another {message}; repeat the options" in str(refused.value)
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == before


def test_a_cell_of_a_version_with_fewer_settings_is_read(start, tmp_path):
    only = dataclasses.replace(STUDY, cells=STUDY.cells[1:])
    text = start(study=only)
    file = tmp_path / "study" / "pixel_knn" / "seed-0" / "run.json"
    request = checkpoint.read_json(file)
    del request["model"]["neighbors"]
    checkpoint.write_json(file, request)
    assert start(study=only) == text
    request["model"]["aspect"] = "pad"
    checkpoint.write_json(file, request)
    with pytest.raises(RunError, match="another model setting aspect: expected 'stretch', got 'pad'"):
        start(study=only)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auc": 1}, "auc must hold a number for each signal, got 1"),
        ({"low": {"pixel_knn": "0.5"}}, "low must hold a number for each signal, got {'pixel_knn': '0.5'}"),
        ({"signal": []}, "signal must be a name, got []"),
        ({"seconds": None}, "seconds must be a number, got None"),
        ({"minutes": 1}, "must hold signal, auc, low, high, best_accuracy, "),
        (None, "is not a JSON document"),
    ],
    ids=["number", "text in it", "no name", "nothing", "unknown entry", "cut"],
)
def test_a_damaged_result_is_named_with_the_remedy(start, tmp_path, changes, message):
    only = dataclasses.replace(STUDY, cells=STUDY.cells[1:])
    start(study=only)
    file = tmp_path / "study" / "pixel_knn" / "seed-0" / cells.RESULT
    content = file.read_text()
    file.write_text(content[:40] if changes is None else json.dumps({**json.loads(content), **changes}))
    with pytest.raises(CheckpointError) as damaged:
        start(study=only)
    said = str(damaged.value)
    assert said.startswith(str(file)) and message in said and "__init__" not in said
    assert said.endswith("; delete it, and the same command measures the model again")
    file.unlink()
    assert "pixel_knn" in start(study=only)


def test_a_plan_that_was_damaged_is_named(started, tmp_path):
    file = tmp_path / "study" / "study.json"
    checkpoint.write_json(file, {**checkpoint.read_json(file), "plan": {"width": 4}})
    with pytest.raises(CheckpointError, match=r"study\.json: plan must hold width, epochs, measured, got"):
        started()


def test_finished_models_stay_in_the_table_when_only_others_are_run(started, tmp_path):
    more = Cell("last epoch", training={"checkpoint_seconds": 0})
    run, study = started, dataclasses.replace(STUDY, cells=(*STUDY.cells, more))
    assert started.text.count("full model") and "pixel_knn" not in started.text
    # A fitted model needs no plan, and the networks that are only read keep theirs.
    text = run(study=study, only=STUDY.cells[1:], plan=Plan(8, 7), seeds=2)
    assert "full model" in text and "pixel_knn" in text and "last epoch" not in text
    assert "width 4, 1 epoch," in text and "; 1 to 2 seeds." in text
    assert checkpoint.read_json(tmp_path / "study" / "study.json")["plan"]["width"] == 4
    written = [
        (row["model"], row["seed"]) for row in tiny.rows(tmp_path / "study" / "results.csv") if row["own"] == "1"
    ]
    assert written == [("full model", "0"), ("pixel_knn", "0"), ("pixel_knn", "1")]
    with pytest.raises(RunError, match="epochs: expected 2, got 1"):
        run(study=study, only=(more,), plan=Plan(4, 2))
    assert not (tmp_path / "study" / "last_epoch").exists()


def test_a_budget_is_picked_once_after_the_fitted_models(start, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_module, "_cost", lambda *_: (1.0, 1.0, 0.1))
    text = start(plan=None, minutes=1e-6)
    assert "width 4, 1 epoch, learning" in text and "picked for" in text
    assert start.lines[1].startswith("width 4, epochs: 1, picked for")
    monkeypatch.setattr("simsid.study.run.choose_plan", None)
    assert start(plan=None, minutes=1e-6) == text


def test_a_cell_that_the_image_size_rules_out_is_left_out_with_the_reason(start):
    text = start(study=Study("patches", (Cell("P = 5", changes={"patches": 5}), STUDY.cells[1])))
    assert "pixel_knn" in text and "P = 5" not in text
    assert start.lines[0].startswith("left out P = 5: image_size must be a multiple of")

"""A study's cells: finished ones are read, a killed one resumes, another request is refused."""

import dataclasses

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
        values = {"study": STUDY, "seeds": 1, "plan": Plan(4, 2), "minutes": None, "criterion": "auto"}
        values = {"images": StudyImages(None), **values, **changes}
        return StudyRun("own", folder=tmp_path / folder, device="cpu", report=lines.append, **values).run()

    run.lines = lines
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


def test_a_folder_with_another_request_is_refused(start):
    study = dataclasses.replace(STUDY, cells=STUDY.cells[:1])
    start(study=study, plan=Plan(4, 1))
    for changes, message in (({"plan": Plan(4, 3)}, "another training"), ({"criterion": "last"}, "another criterion")):
        with pytest.raises(RunError, match=message):
            start(study=study, **{"plan": Plan(4, 1), **changes})


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
    with pytest.raises(RunError, match="holds a run with another model"):
        start(study=only)


def test_a_damaged_result_is_named(start, tmp_path):
    only = dataclasses.replace(STUDY, cells=STUDY.cells[1:])
    start(study=only)
    checkpoint.write_json(tmp_path / "study" / "pixel_knn" / "seed-0" / cells.RESULT, {"auc": 1})
    with pytest.raises(CheckpointError, match="is not a result of a study"):
        start(study=only)


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

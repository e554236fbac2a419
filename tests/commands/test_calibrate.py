"""`simsid calibrate`: on the training data, and on normal images of the place of use."""

import re

import pytest
import tiny

from simsid import Model
from simsid.commands.calibrate import few_images_note
from simsid.training.run_folder import RunFolder


@pytest.fixture
def uncalibrated(tmp_path):
    tiny.model().save(tmp_path / "model")
    return "model"


def test_calibration_on_the_training_data_holds_images_out(simsid, uncalibrated, films, tmp_path):
    done = simsid("calibrate", uncalibrated, films, "--val-share", "0.3")
    assert done.code == 0 and "calibrated on 5 normal images, with 2 held out for thresholds" in done.out
    assert "the largest of 2 normal images, which are too few for a false positive rate of 0.05: 0.33 is" in done.out
    calibration = Model.load(tmp_path / "model").calibration
    assert calibration.count == 5 and len(calibration.holdout["residual"]) == 2
    scored = simsid("score", uncalibrated, films, "-o", "out", "--pictures", "0")
    assert scored.code == 0
    assert "flagged: above the highest of 2 held-out normal images, too few for a rate of 5 %" in scored.out


def test_local_calibration_takes_every_normal_image_and_prints_the_threshold(simsid, uncalibrated, tmp_path):
    listed = [[path, 0] for path in tiny.films(tmp_path / "normal", 39)]
    listed += [[path, 1] for path in tiny.films(tmp_path / "abnormal", 3, seed=1)]
    tiny.write_list(tmp_path / "list.csv", ["path", "label"], listed)
    done = simsid("calibrate", uncalibrated, "list.csv", "--local", "--false-positive-rate", "0.1")
    assert done.code == 0, done.err
    assert "calibrated on 39 normal images, which also set the threshold" in done.out
    model = Model.load(tmp_path / "model")
    assert model.calibration.count == 39
    found = re.search(
        r"threshold of (\w+): (\S+), from 39 normal images, for a false positive rate of at most 0\.1; on new images "
        r"of the same origin the rate lies between (\S+) and (\S+) with 95 % confidence",
        done.out,
    )
    name, threshold, low, high = found.groups()
    assert name == model.signal
    assert float(threshold) == pytest.approx(model.calibration.threshold(name, 0.1), rel=1e-5)
    # Beta(4, 36) of the order statistic: its 2.5 and 97.5 percentiles.
    assert (float(low), float(high)) == pytest.approx((0.0287, 0.209), abs=5e-4)
    # Beta(20, 181).
    note = "39 normal images say little about a false positive rate of 0.1; with 200 it lies between 0.0622 and 0.144"
    assert done.err == f"simsid: note: {note}\n"


def test_note_on_few_images_ends_where_twenty_are_expected_to_be_flagged():
    assert few_images_note(400, 0.05) is None and "399 normal images say little" in few_images_note(399, 0.05)


def test_files_that_cannot_be_read_or_are_excluded_are_left_out(simsid, uncalibrated, tmp_path):
    tiny.films(tmp_path / "data", 9)
    tiny.films(tmp_path / "data" / "masks", 2, seed=1)
    path = tiny.damaged(tmp_path / "data")
    done = simsid("calibrate", uncalibrated, "data", "--local", "--exclude", "masks")
    assert done.code == 0 and "calibrated on 9 normal images" in done.out
    assert f"1 files could not be read, such as {path}: " in done.out


def test_a_run_that_is_being_trained_is_refused(simsid, uncalibrated, films, tmp_path):
    (tmp_path / "model" / "run.json").write_text("{}")
    with RunFolder(tmp_path / "model"):
        done = simsid("calibrate", uncalibrated, films)
    assert done.code == 2 and "is in use by another process" in done.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("list.csv --local", "list.csv has no normal image to calibrate on"),
        ("list.csv", "has no normal image to train on"),
        ("list.csv --local --false-positive-rate 1", "false_positive_rate must lie strictly between 0 and 1, got 1.0"),
    ],
)
def test_a_refused_calibration_leaves_the_model_as_it_was(simsid, model, films, tmp_path, line, message):
    tiny.write_list(tmp_path / "list.csv", ["path", "label"], [[path, 1] for path in films.iterdir()])
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    done = simsid("calibrate", model, *line.split())
    assert done.code == 2 and done.err.startswith("simsid: ") and message in done.err
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_few_local_images_are_refused_and_the_calibration_stays(simsid, tmp_path):
    made = tiny.calibrated(tmp_path / "model")
    tiny.films(tmp_path / "data", 2)
    done = simsid("calibrate", "model", "data", "--local")
    message = "calibration on local images needs at least 3 images, got 2 in data"
    assert (done.code, done.err) == (2, f"simsid: {message}\n")
    assert Model.load(tmp_path / "model").calibration == made.calibration


def test_shipped_model_stays_and_adapt_is_named(simsid, tmp_path):
    tiny.films(tmp_path / "data", 1)
    done = simsid("calibrate", "zhanglab", "data", "--local")
    assert done.code == 2 and "comes with simsid and stays as it is; give a folder for a calibrated copy" in done.err
    assert done.err.endswith("or adapt it with: simsid adapt zhanglab data -o FOLDER\n")


def test_copy_is_calibrated_in_another_folder_and_the_model_stays(simsid, model, films, tmp_path):
    before = Model.load(model).calibration
    done = simsid("calibrate", model, films, "--local", "-o", "copy")
    assert done.code == 0 and done.out.startswith("copy: calibrated on 7 normal images")
    assert Model.load(tmp_path / "copy").calibration.count == 7 and Model.load(model).calibration == before
    done = simsid("calibrate", model, films, "-o", "copy")
    assert done.code == 2 and "copy already holds a model; choose another folder with -o" in done.err


def test_empty_argument_is_refused(simsid, tmp_path):
    done = simsid("score", "model", "data", "-o", "")
    assert done.code == 2 and "an argument is empty" in done.err

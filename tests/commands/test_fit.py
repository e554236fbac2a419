"""`simsid train` of models that are fitted in one pass: the baselines."""

import json

import pytest
import tiny

from simsid import load
from simsid.models import PixelKNN, PixelPCA

KINDS = {"pixel_knn": (PixelKNN, "--neighbors"), "pixel_pca": (PixelPCA, "--components")}


@pytest.mark.parametrize("preset", KINDS)
def test_a_baseline_is_trained_scored_evaluated_and_calibrated_like_a_network(simsid, zhanglab, tmp_path, preset):
    kind, option = KINDS[preset]
    run = tmp_path / "runs" / f"chest_xray-{preset}"
    done = simsid("train", zhanglab, "--preset", preset, "--image-size", "16", option, "3", "--val-share", "0.3")
    assert done.code == 0, done.err
    assert "training on 4 images, validating on 4 normal and 2 abnormal" in done.out
    assert f"use it with: simsid score {run.relative_to(tmp_path)} FOLDER -o DIR" in done.out
    assert "sens., spec. and the false positive rate are in-sample" in done.out
    tiny.assert_self_contained(run / "report.html")
    request = json.loads((run / "run.json").read_text())
    assert (request["command"], request["preset"], request["model"]["image_size"]) == ("fit", preset, 16)
    assert len(tiny.rows(run / "manifest.csv")) == 10
    model = load(run)
    assert type(model) is kind and model.signal == preset and len(model.calibration.holdout[preset]) == 4

    done = simsid("score", run, zhanglab / "test", "-o", "scores")
    assert done.code == 0 and "6 of 6 files scored" in done.out
    tiny.assert_self_contained(tmp_path / "scores" / "report.html")
    assert list(tiny.rows(tmp_path / "scores" / "scores.csv")[0])[5:] == [preset, "reason"]
    done = simsid("evaluate", run, zhanglab)
    assert done.code == 0 and preset in done.out and "in-sample" not in done.out
    assert len(tiny.rows(run / "evaluation" / "scores.csv")) == 6

    before = model.calibration
    done = simsid("calibrate", run, zhanglab / "test" / "NORMAL", "--local")
    assert done.code == 0 and "calibrated on 3 normal images, which also set the threshold" in done.out
    assert load(run).calibration != before and load(run).calibration.count == 3
    # Against the images it was trained on, an image's distance to itself would be counted as normal.
    done = simsid("calibrate", run, zhanglab, "--val-share", "0.3")
    assert done.code == 0 and load(run).calibration == before


def test_help_of_a_baseline_lists_its_own_options(simsid):
    done = simsid("train", "--preset", "pixel_pca", "--help")
    assert done.code == 0 and "--components" in done.out and "--epochs" not in done.out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--preset pixel_knn", "train needs a folder or CSV of images"),
        ("FILMS --preset pixel_knn --neighbors 0", "neighbors must be at least 1, got 0"),
        ("FILMS --preset pixel_pca --image-size 0", "image_size must be at least 1, got 0"),
        ("FILMS --preset pixel_pca --val-share 2", "val_share must lie strictly between 0 and 1, got 2.0"),
        ("FILMS --preset=pixel_knn --device tpu", "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("nowhere --preset pixel_knn", "nowhere does not exist"),
        ("empty --preset pixel_knn", "empty has no image"),
    ],
)
def test_wrong_requests_get_one_sentence(simsid, films, tmp_path, line, message):
    (tmp_path / "empty").mkdir()
    done = simsid("train", *line.replace("FILMS", str(films)).split())
    assert done.code == 2
    assert done.err.startswith("simsid: ") and done.err.count("\n") == 1 and message in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_options_of_another_model_are_refused_by_the_parser(simsid, films):
    done = simsid("train", films, "--preset", "pixel_knn", "--epochs", "3")
    assert done.code == 2 and "--epochs" in done.err
    done = simsid("train", films, "--preset", "moustache")
    assert done.code == 2 and "pixel_knn" in done.err


def test_a_fitted_model_is_neither_overwritten_nor_resumed(simsid, films, tmp_path):
    options = ("--preset", "pixel_knn", "--image-size", "16", "-o", "run")
    assert simsid("train", films, *options).code == 0
    done = simsid("train", films, *options)
    assert done.code == 2 and "run already holds a run or a model" in done.err
    done = simsid("train", "--resume", "run")
    assert done.code == 2 and "run was fitted in one pass and has nothing to resume" in done.err


def test_images_beyond_the_most_that_a_model_takes_are_not_read(simsid, tmp_path):
    folder = tiny.zhanglab(tmp_path / "chest_xray", train=14, val=2)
    done = simsid("train", folder, "-o", "run", "--preset", "feature_knn", "--image-size", "32", "--most-images", "9")
    assert done.code == 0, done.err
    listed = [row["split"] for row in tiny.rows(tmp_path / "run" / "manifest.csv")]
    left_out = int(done.out.split("a uniform sample: ")[1].split()[0])
    assert left_out > 0 and listed.count("train") == 9 and f"training on {9} images" in done.out

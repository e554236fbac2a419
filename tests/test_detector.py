"""The scikit-learn estimator: its signs and thresholds, its inputs, and scikit-learn's own checks."""

import json
import warnings

import numpy as np
import pytest
import tiny
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator

import simsid
from simsid import Detector, TrainingConfig
from simsid.data import read
from simsid.errors import CheckpointError, ConfigError, InputError, InputTypeError, ReadError
from simsid.models import PixelKNN, PixelPCA

RNG = np.random.default_rng(0)
NORMAL = np.clip(RNG.normal(-0.5, 0.1, (60, 12, 12)), -1, 1)
BRIGHT = np.clip(RNG.normal(0.5, 0.1, (20, 12, 12)), -1, 1)


def test_scikit_learns_own_checks_pass():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(Detector(input_range="fit"), on_fail=None, on_skip=None)
    failed = {result["check_name"]: result["exception"] for result in results if result["status"] == "failed"}
    assert not failed
    # They need the environment variable SCIPY_ARRAY_API, and pandas.
    skipped = {result["check_name"] for result in results if result["status"] == "skipped"}
    assert skipped <= {"check_array_api_input", "check_classifier_data_not_an_array"}
    assert sum(result["status"] == "passed" for result in results) >= 40


@pytest.mark.parametrize("model", ["pixel_knn", "pixel_pca"])
def test_anomalies_score_lower_and_are_minus_one(model):
    detector = Detector(model).fit(NORMAL[:40])
    normal, bright = detector.score_samples(NORMAL[40:]), detector.score_samples(BRIGHT)
    assert normal.dtype == np.float64 and normal.min() > bright.max()
    assert (detector.predict(BRIGHT) == -1).all() and (detector.predict(NORMAL[40:]) == 1).mean() > 0.7
    np.testing.assert_array_equal(detector.decision_function(BRIGHT), detector.score_samples(BRIGHT) - detector.offset_)
    np.testing.assert_array_equal(detector.fit_predict(NORMAL), detector.fit(NORMAL).predict(NORMAL))


def test_scores_are_those_of_the_model():
    images = torch.from_numpy(NORMAL).float()[:, None]
    model = PixelKNN(image_size=12, neighbors=3).fit(images)
    detector = Detector(neighbors=3).fit(NORMAL)
    np.testing.assert_array_equal(detector.score_samples(NORMAL), -model.signals(images)["pixel_knn"])
    assert detector.offset_ == -model.calibration.threshold("pixel_knn", 0.05)
    flagged = model.signals(images)["pixel_knn"] > model.calibration.threshold("pixel_knn", 0.05)
    np.testing.assert_array_equal(detector.predict(NORMAL) == -1, flagged)


def test_contamination_sets_the_fraction_of_outliers_in_the_training_images():
    for contamination in (0.1, 0.25):
        predicted = Detector(contamination=contamination).fit_predict(NORMAL)
        assert (predicted == -1).mean() == pytest.approx(contamination, abs=0.02)


def test_holdout_images_set_the_threshold_and_are_not_trained_on():
    detector = Detector(holdout=0.5, false_positive_rate=0.2).fit(NORMAL)
    assert detector.model_.tensors["train"].shape[0] == 30
    held = detector.model_.calibration.holdout["pixel_knn"]
    assert len(held) == 30 and sum(value > -detector.offset_ for value in held) / 30 <= 0.2
    other = Detector(holdout=0.5, random_state=1).fit(NORMAL)
    assert not torch.equal(other.model_.tensors["train"], detector.model_.tensors["train"])
    assert torch.equal(clone(detector).fit(NORMAL).model_.tensors["train"], detector.model_.tensors["train"])


@pytest.mark.parametrize(
    "change",
    [
        lambda X: X[:, None],
        lambda X: X.reshape(len(X), -1),
        lambda X: torch.from_numpy(X),
        lambda X: X.astype(np.float32),
        lambda X: np.rint((X + 1) * 127.5).astype(np.uint8),
        lambda X: np.rint((X + 1) * 32767.5).astype(np.uint16),
    ],
    ids=["n1HW", "rows", "tensor", "float32", "uint8", "uint16"],
)
def test_every_form_of_array_gives_the_same_scores(change):
    detector = Detector().fit(NORMAL)
    np.testing.assert_allclose(detector.score_samples(change(BRIGHT)), detector.score_samples(BRIGHT), atol=2e-2)
    np.testing.assert_allclose(
        clone(detector).fit(change(NORMAL)).score_samples(BRIGHT), detector.score_samples(BRIGHT), atol=2e-2
    )


def test_ends_of_uint8_are_black_and_white():
    X = np.zeros((4, 8, 8), np.uint8)
    X[1::2] = 255
    detector = Detector(neighbors=1).fit(X)
    assert set(detector.model_.tensors["train"].unique().tolist()) == {-1.0, 1.0}


def test_input_range_maps_other_numbers():
    expected = Detector().fit(NORMAL).score_samples(BRIGHT)
    scaled = Detector(input_range=(0, 1)).fit((NORMAL + 1) / 2)
    np.testing.assert_allclose(scaled.score_samples((BRIGHT + 1) / 2), expected, atol=1e-6)
    fitted = Detector(input_range="fit").fit(1000 * NORMAL)
    assert fitted.input_range_ == (1000 * NORMAL.min(), 1000 * NORMAL.max())
    assert fitted.model_.tensors["train"].min() == -1 and fitted.model_.tensors["train"].max() == 1
    assert (fitted.predict(1e6 * BRIGHT) == -1).all(), "clipped, and not an error"


def test_paths_are_read_as_the_model_prepares_them(tmp_path):
    paths = tiny.films(tmp_path, 6)
    detector = Detector(image_size=16).fit(paths)
    expected = detector.score_samples(np.concatenate([read(path, detector.model_).numpy() for path in paths]))
    for form in (paths, [str(path) for path in paths], np.array([str(path) for path in paths])):
        np.testing.assert_array_equal(detector.score_samples(form), expected)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ReadError, match=r"1 of 2 files could not be read; the first, .*broken.png"):
        detector.score_samples([paths[0], tmp_path / "broken.png"])
    scores = cross_val_score(Detector(image_size=16), paths, [1, 0] * 3, cv=2, scoring="roc_auc")
    assert scores.shape == (2,) and np.isfinite(scores).all()


def test_cross_validation_and_grid_search_over_a_field_of_the_model():
    # An anomaly after every ten normal images, as folds are not shuffled.
    X = np.concatenate([np.concatenate([NORMAL[10 * i : 10 * i + 10], BRIGHT[i : i + 1]]) for i in range(6)])
    y = np.array(6 * ([1] * 10 + [-1]))
    assert cross_val_score(Detector(contamination=0.1), X, y, cv=3, scoring="roc_auc").min() > 0.95
    search = GridSearchCV(Detector(), {"neighbors": [1, 5], "false_positive_rate": [0.1, 0.2]}, scoring="roc_auc", cv=2)
    search.fit(X, y)
    assert search.best_params_.keys() == {"neighbors", "false_positive_rate"}
    assert search.best_estimator_.model_.config.neighbors == search.best_params_["neighbors"]


def test_pipeline_passes_images_through():
    pipeline = make_pipeline(FunctionTransformer(lambda X: X * 0.5), Detector("pixel_pca", components=4))
    pipeline.fit(NORMAL)
    assert (pipeline.predict(BRIGHT) == -1).all()
    assert pipeline.set_params(detector__components=2).fit(NORMAL)[-1].model_.config.components == 2


def test_parameters_of_the_model_are_parameters_of_the_detector():
    detector = Detector("pixel_pca", components=4)
    assert detector.get_params()["components"] == 4
    assert clone(detector.set_params(image_size=12)).get_params() == detector.get_params()
    assert "components=4" in repr(detector)
    with pytest.raises(InputError, match=r"'neighbours' is not a parameter; there are .*neighbors"):
        Detector().set_params(neighbours=3)
    with pytest.raises(ConfigError, match="'neighbours' is not a configuration field"):
        Detector(neighbours=3).fit(NORMAL)


def test_function_makes_the_model():
    detector = Detector(PixelPCA, image_size=12, components=3).fit(NORMAL)
    assert detector.model_.kind == "pixel_pca" and detector.model_.config.components == 3
    assert clone(detector).model is PixelPCA


def test_network_learns_and_keeps_its_weights_apart_from_the_global_seed():
    options = {"fit_options": {"config": TrainingConfig(epochs=1, batch_size=4)}, "holdout": 0.25, **tiny.SIZES}
    images = tiny.images(8)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="held-out normal images cannot guarantee"):
        detector = Detector("simsid", signal="residual", **options).fit(images)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(detector.model_.calibration.holdout["residual"]) == 2
    expected = -detector.model_.signals(images, ["residual"])["residual"]
    np.testing.assert_array_equal(detector.score_samples(images), expected)
    with pytest.warns(UserWarning, match="the threshold comes from the training images"):
        Detector("simsid", **{**options, "holdout": 0.0}).fit(images)


def test_saved_detector_is_the_same_without_pickle(tmp_path):
    detector = Detector("pixel_pca", components=4, input_range=(0, 2), contamination=0.1).fit(NORMAL + 1)
    detector.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = Detector.load(tmp_path)
    np.testing.assert_array_equal(loaded.decision_function(BRIGHT + 1), detector.decision_function(BRIGHT + 1))
    assert loaded.get_params() == detector.get_params() and clone(loaded).get_params() == detector.get_params()
    assert simsid.load(tmp_path).kind == "pixel_pca"
    Detector(PixelKNN, image_size=12).fit(NORMAL).save(tmp_path / "function")
    with pytest.raises(InputTypeError, match="model must be a preset's name or a function, got None"):
        Detector.load(tmp_path / "function").fit(NORMAL)


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": None},
        {"parameters": {"contamination": 3}},
        {"parameters": {"input_range": "wide"}},
        {"fitted": {}},
        {"fitted": {"offset": "x", "n_features_in": 1, "input_range": None}},
        {"fitted": {"offset": 0.0, "n_features_in": 1, "input_range": [1, 0]}},
    ],
    ids=str,
)
def test_damaged_detector_file_is_a_checkpoint_error(tmp_path, change):
    Detector().fit(NORMAL).save(tmp_path)
    path = tmp_path / "detector.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match="is not a detector"):
        Detector.load(tmp_path)


@pytest.mark.parametrize(
    ("parameters", "X", "kind", "message"),
    [
        ({}, NORMAL[:, :, :6], InputError, r"X must have shape \[n, 1, H, W\] or \[n, H, W\] with H = W"),
        ({}, np.zeros((3, 2, 8, 8)), InputError, r"X must have shape .* got \[3, 2, 8, 8\]"),
        ({}, 3 * NORMAL, InputError, "must lie in -1..1"),
        ({}, np.zeros((3, 8, 8), int), InputTypeError, "X must be floating point, uint8 or uint16 without input_range"),
        ({}, "folder", InputTypeError, "X must be an array of images or a list of paths, got the path 'folder'"),
        ({}, ["a.png", 3], InputTypeError, "X must hold paths only, got an item of type int"),
        ({"image_size": 12}, np.zeros((3, 140)), InputError, r"X must have H \* W values a row"),
        ({"image_size": 16}, NORMAL, InputError, r"images must have shape \[B, 1, 16, 16\]"),
        ({"contamination": 0.6}, NORMAL, InputError, r"contamination must be None or in \(0, 0.5\], got 0.6"),
        ({"false_positive_rate": 1.0}, NORMAL, InputError, "false_positive_rate"),
        ({"holdout": 1.0}, NORMAL, InputError, "holdout must be at least 0 and below 1"),
        ({"input_range": (1, 0)}, NORMAL, InputError, "input_range must be None, 'fit' or two numbers"),
        ({"signal": "residual"}, NORMAL, InputError, "signal must be one of pixel_knn, got 'residual'"),
        ({"model": "nonsense"}, NORMAL, ConfigError, "preset must be one of"),
    ],
)
def test_unusable_input_is_one_clear_error(parameters, X, kind, message):
    with pytest.raises(kind, match=message):
        Detector(**parameters).fit(X)


def test_unfitted_detector_and_other_sizes_are_refused():
    with pytest.raises(NotFittedError):
        Detector().predict(NORMAL)
    with pytest.raises(NotFittedError):
        Detector().save("nowhere")
    with pytest.raises(ValueError, match="X has 100 features, but Detector is expecting 144"):
        Detector().fit(NORMAL).predict(np.zeros((2, 10, 10)))

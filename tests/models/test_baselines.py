"""The baselines on pixels as models: fit, signals, maps, calibration, save and load, evaluation, wrong inputs."""

import json

import numpy as np
import pytest
import torch
from sklearn.ensemble import IsolationForest

from simsid import load
from simsid.data import ImageSet, Record
from simsid.errors import CheckpointError, ConfigError, InputError, SimsidError
from simsid.evaluation import evaluate
from simsid.models import PixelIsolationForest, PixelKNN, PixelPCA

SIDE = 12
KINDS = {
    "pixel_knn": (PixelKNN, {"neighbors": 5}),
    "pixel_pca": (PixelPCA, {"components": 3}),
    "pixel_isolation_forest": (PixelIsolationForest, {"trees": 30}),
}


def smooth_images(seed=0, count=60):
    """Images `[count, 1, 12, 12]` of three random waves, which span few components."""
    generator = np.random.default_rng(seed)
    axis = np.linspace(0.0, np.pi, SIDE)
    waves = np.stack([np.outer(np.sin(axis * i), np.sin(axis * j)).ravel() for i, j in ((1, 1), (1, 2), (2, 1))])
    pixels = (generator.normal(size=(count, 3)) @ waves * 0.2 - 0.1).clip(-0.9, 0.9)
    pixels += generator.normal(scale=0.01, size=pixels.shape)
    return torch.from_numpy(pixels.astype(np.float32)).view(count, 1, SIDE, SIDE)


def with_square(images):
    """The same images with a bright square in the middle."""
    images = images.clone()
    images[:, :, 4:7, 4:7] = 0.95
    return images


def obvious(name, images):
    """Anomalies that the baseline must find; single pixels say little of a small square, so the forest gets all."""
    return torch.full_like(images, 0.95) if name == "pixel_isolation_forest" else with_square(images)


def made(name, **changes):
    kind, options = KINDS[name]
    return kind(image_size=SIDE, **{**options, **changes})


def rows(images):
    return images.flatten(1).double().numpy()


@pytest.mark.parametrize("name", KINDS)
def test_obvious_anomalies_have_the_highest_signal_and_score(name):
    model = made(name).fit(smooth_images(0), smooth_images(3, 30))
    assert (model.kind, model.signal, model.signal_names) == (name, name, (name,))
    normal, abnormal = smooth_images(1, 20), obvious(name, smooth_images(2, 20))
    signals = model.signals(torch.cat([normal, abnormal]))
    assert signals.keys() == {name} and signals[name].shape == (40,) and signals[name].dtype == np.float64
    assert signals[name][:20].max() < signals[name][20:].min()
    scores = model.score(abnormal)
    assert scores.dtype == torch.float64 and scores.min() > 0.9


@pytest.mark.parametrize("name", KINDS)
def test_signals_repeat_do_not_depend_on_other_images_and_leave_the_input_unchanged(name):
    train, test = smooth_images(0), smooth_images(1, 10)
    before = train.clone(), test.clone()
    model = made(name).fit(train)
    first = model.signals(test)[name]
    np.testing.assert_array_equal(first, made(name).fit(train).signals(test)[name])
    np.testing.assert_array_equal(first[3:4], model.signals(test[3:4])[name])
    assert torch.equal(train, before[0]) and torch.equal(test, before[1])


@pytest.mark.parametrize("neighbors", [1, 5, 15, 99])
def test_knn_is_the_mean_distance_to_the_nearest_training_images(neighbors):
    train, test = smooth_images(0, 15), smooth_images(1, 4)
    model = made("pixel_knn", neighbors=neighbors).fit(train)
    distances = np.linalg.norm(rows(test)[:, None] - rows(train)[None], axis=2)
    expected = np.sort(distances, axis=1)[:, :neighbors].mean(axis=1)
    np.testing.assert_allclose(model.signals(test)["pixel_knn"], expected, rtol=1e-4)
    assert model.map_names == () and model.pictures(test) == {}


def test_pca_is_the_error_that_the_components_leave_and_its_map_shows_where():
    train, test = smooth_images(0, 30), with_square(smooth_images(1, 5))
    model = made("pixel_pca").fit(train)
    mean = rows(train).mean(axis=0)
    components = np.linalg.svd(rows(train) - mean, full_matrices=False)[2][:3]
    centered = rows(test) - mean
    rebuilt = centered @ components.T @ components
    error = (centered - rebuilt) ** 2
    np.testing.assert_allclose(model.signals(test)["pixel_pca"], error.mean(axis=1), rtol=1e-3)
    maps = model.maps(test, "pixel_pca")
    assert model.map_names == ("pixel_pca",) and maps.dtype == torch.float32 and maps.shape == (5, SIDE, SIDE)
    np.testing.assert_allclose(maps.flatten(1).numpy(), error, atol=1e-4)
    inside = maps[:, 4:7, 4:7].mean()
    assert inside > 5 * maps.mean()
    picture = model.pictures(test)["reconstruction"]
    np.testing.assert_allclose(picture.flatten(1).numpy(), rebuilt + mean, atol=1e-4)


def test_pca_uses_no_more_components_than_the_images_span():
    train = smooth_images(0, 5)
    model = made("pixel_pca", components=64).fit(train)
    assert model.tensors["components"].shape == (4, SIDE * SIDE)
    np.testing.assert_allclose(model.signals(train)["pixel_pca"], 0.0, atol=1e-10)


def test_isolation_forest_scores_as_scikit_learns_and_refuses_indices_out_of_range(tmp_path):
    train, test = smooth_images(0, 300), torch.cat([smooth_images(1, 20), with_square(smooth_images(2, 20))])
    model = made("pixel_isolation_forest", trees=20, sample=64, seed=3).fit(train)
    reference = IsolationForest(n_estimators=20, max_samples=64, random_state=3).fit(train.flatten(1).numpy())
    expected = -reference.score_samples(test.flatten(1).numpy())
    np.testing.assert_allclose(model.signals(test)["pixel_isolation_forest"], expected, rtol=1e-12)
    model.tensors = {**model.tensors, "left": model.tensors["left"] + 100_000}
    model.save(tmp_path)
    with pytest.raises(CheckpointError, match="the tensors must be the nodes of trees over 144 pixels"):
        load(tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_fit_calibrates_on_the_normal_images_of_val_and_else_by_halves(name):
    train, val = smooth_images(0, 20), smooth_images(1, 7)
    records = tuple(Record(f"{i}", label=int(i >= 5)) for i in range(7))
    model = made(name).fit(train, ImageSet(val, records))
    held = model.signals(val[:5])[name]
    assert model.calibration.count == 5 and model.calibration.holdout[name] == held.tolist()
    assert model.calibration.mean[name] == pytest.approx(held.mean())
    # Without val an image is measured by a model of the half that it is not in, never against itself.
    model = made(name).fit(train)
    expected = np.zeros(20)
    expected[::2] = made(name).fit(train[1::2]).signals(train[::2])[name]
    expected[1::2] = made(name).fit(train[::2]).signals(train[1::2])[name]
    assert model.calibration.count == 20
    np.testing.assert_allclose(model.calibration.holdout[name], expected, rtol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_calibrate_prefers_held_out_images(name):
    train, other = smooth_images(0, 20), smooth_images(1, 9)
    model = made(name).fit(train)
    model.calibrate(train, iter([other]))
    assert model.calibration.count == 9 and model.calibration.holdout[name] == model.signals(other)[name].tolist()
    model.calibrate(other)
    assert model.calibration.count == 9 and model.calibration.holdout == {}


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_model_scores_bit_for_bit_as_before(name, tmp_path):
    model = made(name).fit(smooth_images(0), smooth_images(3, 30))
    model.save(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is type(model) and loaded.config == model.config
    assert loaded.calibration == model.calibration and loaded.identity() == model.identity()
    test = smooth_images(1, 10)
    np.testing.assert_array_equal(loaded.signals(test)[name], model.signals(test)[name])
    # A command that computes on a GPU moves the model there all the same.
    assert loaded.to_device("cuda").device.type == "cpu"


@pytest.mark.parametrize("name", KINDS)
def test_evaluate_takes_a_baseline(name):
    model = made(name).fit(smooth_images(0), smooth_images(3, 30))
    pixels = torch.cat([smooth_images(1, 20), obvious(name, smooth_images(2, 10))])
    records = tuple(Record(f"{i}", "test", int(i >= 20), "mass" if i >= 20 else "NORMAL") for i in range(30))
    row = evaluate(model, ImageSet(pixels, records)).rows()[0]
    assert (row.signal, row.normal, row.abnormal, row.auc, row.sensitivity) == (name, 20, 10, 1.0, 1.0)


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_refused(name, tmp_path):
    model = made(name).fit(smooth_images(0, 8))
    first = next(name for name, tensor in model.tensors.items() if tensor.is_floating_point())
    model.tensors = {**model.tensors, first: torch.full_like(model.tensors[first], torch.nan)}
    model.save(tmp_path / "nan")
    with pytest.raises(CheckpointError, match=f"tensor {first} holds NaN or infinite values"):
        load(tmp_path / "nan")
    model.tensors = {first: torch.zeros(3, 5)}
    model.save(tmp_path / "shape")
    with pytest.raises(CheckpointError, match="the tensors must be"):
        load(tmp_path / "shape")
    made(name).fit(smooth_images(0, 8)).save(tmp_path / "field")
    file = tmp_path / "field" / "model.json"
    document = json.loads(file.read_text())
    document["config"]["moustache"] = 1
    file.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="'moustache' is not a configuration field"):
        load(tmp_path / "field")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.signals(smooth_images(0, 2)), "is not fitted: call fit"),
        (lambda model: model.pictures(smooth_images(0, 2)) or model.save("x"), "is not fitted: call fit"),
        (lambda model: model.fit(smooth_images(0, 2)[:0]), "at least"),
        (lambda model: model.fit(smooth_images(0, 4)).signals(torch.zeros(1, 1, 8, 8)), r"\[B, 1, 12, 12\]"),
        (lambda model: model.fit(smooth_images(0, 4) + 5), "-1"),
        (lambda model: model.fit(smooth_images(0, 4)).signals(smooth_images(0, 1), ["residual"]), "signal must be"),
        (lambda model: model.fit(smooth_images(0, 4)).maps(smooth_images(0, 1), "residual"), "signal must be"),
    ],
    ids=["signals before fit", "save before fit", "no image", "other size", "range", "signal", "map"],
)
def test_wrong_inputs_are_named(name, call, message):
    with pytest.raises(SimsidError, match=message):
        call(made(name))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PixelKNN(neighbors=0), "neighbors must be at least 1, got 0"),
        (lambda: PixelPCA(components=0), "components must be at least 1, got 0"),
        (lambda: PixelIsolationForest(sample=1), "sample must be at least 2, got 1"),
        (lambda: PixelKNN(components=3), "'components' is not a configuration field"),
        (lambda: PixelPCA(PixelKNN().config), "config must be a PixelPCAConfig"),
        (
            lambda: PixelPCA(image_size=4).fit(torch.zeros(1, 1, 4, 4)),
            "pixel_pca needs at least 2 normal images, got 1",
        ),
    ],
)
def test_wrong_configurations_are_named(make, message):
    with pytest.raises((ConfigError, InputError), match=message):
        make()


def test_training_images_labeled_abnormal_are_warned_of():
    images = smooth_images()
    records = tuple(Record(f"{i}", label=int(i < 2)) for i in range(len(images)))
    with pytest.warns(UserWarning, match="2 of 60 training images are labeled abnormal"):
        made("pixel_pca").fit(ImageSet(images, records))


def test_model_of_another_kind_is_not_replaced(tmp_path):
    first = made("pixel_pca").fit(smooth_images())
    first.save(tmp_path)
    with pytest.raises(InputError, match="holds a model of kind 'pixel_pca', which one of kind 'pixel_knn' must not"):
        made("pixel_knn").fit(smooth_images()).save(tmp_path)
    first.save(tmp_path)
    assert load(tmp_path).kind == "pixel_pca"

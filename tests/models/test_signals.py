"""Signals against slow loops, and their calibration."""

import dataclasses
import json
import math

import numpy as np
import pytest
import tiny
import torch

from simsid import Model, metrics
from simsid.data import ImageSet, Record
from simsid.distributed import ProcessGroup
from simsid.errors import CheckpointError, InputError
from simsid.models.calibration import Calibration, judged_by_others
from simsid.models.signals import (
    SIGNALS,
    available_signals,
    focal_residual,
    local_residual,
    memory_distance,
    memory_distance_map,
    residual,
    residual_map,
)
from simsid.training.validation import validate


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return torch.rand(3, 1, 48, 48), torch.rand(3, 1, 48, 48)


def test_residual(pair):
    images, made = pair
    found = residual(images, made)
    assert found.dtype == torch.float64
    for b in range(3):
        assert found[b].item() == pytest.approx(
            np.mean((images[b].double() - made[b].double()).numpy() ** 2), rel=1e-12
        )


@pytest.mark.parametrize("size", [48, 44])
def test_local_residual(pair, size):
    images, made = (x[..., :size, :size] for x in pair)
    found = local_residual(images, made)
    error = (images.double() - made.double()).numpy()[:, 0] ** 2
    for b in range(3):
        windows = [error[b, i : i + 8, j : j + 8].mean() for i in range(0, size, 8) for j in range(0, size, 8)]
        assert found[b].item() == pytest.approx(max(windows), rel=1e-12)


@pytest.mark.parametrize(("size", "worst"), [(48, 2), (40, 2), (32, 1)])
def test_focal_residual(pair, size, worst):
    images, made = (x[..., :size, :size] for x in pair)
    found = focal_residual(images, made)
    error = (images.double() - made.double()).numpy()[:, 0] ** 2
    for b in range(3):
        windows = [error[b, i : i + 8, j : j + 8].mean() for i in range(0, size, 8) for j in range(0, size, 8)]
        assert found[b].item() == pytest.approx(np.mean(sorted(windows)[-worst:]), rel=1e-12)


def test_memory_distance():
    query, retrieved = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    found = memory_distance(query, retrieved)
    for b in range(2):
        wanted = max(math.dist(query[b, place].tolist(), retrieved[b, place].tolist()) for place in range(3))
        assert found[b].item() == pytest.approx(wanted, rel=1e-12)


def test_residual_map_averages_9_by_9_pixels(pair):
    images, made = pair
    found, error = residual_map(images, made), (images - made)[:, 0].numpy() ** 2
    assert found.shape == (3, 48, 48)
    for i, j in ((0, 0), (20, 30), (47, 3)):
        window = error[1, max(i - 4, 0) : i + 5, max(j - 4, 0) : j + 5]
        assert found[1, i, j].item() == pytest.approx(window.mean(), rel=1e-5)


def values(seed=0, count=50):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(3, 2, count) for name in SIGNALS}


def test_calibration_is_mean_and_deviation_in_float64():
    found = Calibration.fit(values())
    for name, column in values().items():
        assert found.mean[name] == column.mean() and found.std[name] == column.std()
    assert found.count == 50 and found.holdout == {}
    # Where float32 would see one value only.
    close = {"residual": 1e6 + np.arange(10) * 1e-3}
    assert Calibration.fit(close).std["residual"] == pytest.approx(np.std(np.arange(10) * 1e-3), rel=1e-6)


def test_probability_is_the_papers_score():
    """A = 1 - sigmoid((D - mu) / sigma), the signal being the negated logit."""
    logits = np.random.default_rng(0).normal(2, 3, 40)
    name = "discriminator_running"
    found = Calibration.fit({name: -logits}).probability(name, -logits)
    wanted = 1 - 1 / (1 + np.exp(-(logits - logits.mean()) / logits.std()))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert found.dtype == np.float64
    assert (np.diff(found[np.argsort(-logits)]) > 0).all(), "monotone in the raw signal"


def test_probability_stays_in_bounds():
    calibration = Calibration.fit({"residual": np.array([1.0, 2.0])})
    found = calibration.probability("residual", np.array([-1e300, -50.0, 1.5, 50.0, 1e300]))
    assert (found >= 0).all() and (found <= 1).all() and found[2] == 0.5
    constant = Calibration.fit({"residual": np.full(3, 0.25)})
    np.testing.assert_array_equal(constant.probability("residual", np.array([0.2, 0.25, 0.3])), [0, 0.5, 1])


@pytest.mark.parametrize("given", [{}, {"residual": np.zeros(0)}])
def test_nothing_to_calibrate_on(given):
    with pytest.raises(ValueError, match="calibration needs at least one normal image, got none"):
        Calibration.fit(given)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_signals_must_be_finite(bad):
    good, broken = {"residual": np.ones(3)}, {"residual": np.array([1.0, bad, 2.0])}
    for arguments in ((broken,), (good, broken)):
        with pytest.raises(ValueError, match=f"calibration needs finite signals, got residual = {bad}"):
            Calibration.fit(*arguments)


def test_round_trip_through_json():
    calibration = Calibration.fit(values(), values(1, 7))
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": 3}, "calibration: mean must be given by signal"),
        ({"mean": {"nonsense": 1.0}}, "calibration: mean must be given by signal"),
        ({"holdout": []}, "calibration: holdout must be given by signal"),
        ({"holdout": {"residual": 3}}, "calibration: holdout must be a list of numbers by signal"),
        ({"holdout": {"residual": [math.nan]}}, "calibration: holdout must hold finite numbers alone"),
        ({"mean": {"residual": 1.0}}, "calibration: mean and std must be of the same signals"),
        ({"std": {"residual": math.inf}, "mean": {"residual": 1.0}}, "calibration: std must hold finite numbers alone"),
        ({"std": {"residual": "1"}, "mean": {"residual": 1.0}}, "calibration: std must hold finite numbers alone"),
        ({"std": {"residual": 1.0}, "mean": {"residual": 10**400}}, "calibration: mean must hold finite numbers alone"),
        ({"std": {"residual": -1.0}, "mean": {"residual": 1.0}}, "calibration: std must not be negative"),
        ({"count": 0}, "calibration: count must be a whole number of at least 1"),
        ({"count": True}, "calibration: count must be a whole number of at least 1"),
        ({"extra": 1}, "calibration must hold mean, std, count and holdout"),
    ],
)
def test_foreign_calibrations_are_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Calibration.from_dict(Calibration.fit(values()).to_dict() | change)


def test_memory_distance_map_has_its_largest_value_where_the_signal_comes_from():
    query, retrieved = torch.randn(2, 9, 5), torch.randn(2, 9, 5)
    found = memory_distance_map(query, retrieved)
    assert found.shape == (2, 3, 3)
    torch.testing.assert_close(found.flatten(1).amax(1).double(), memory_distance(query, retrieved))


def test_table_names_every_signal_once_and_describes_it():
    assert all(name == signal.name and signal.description and signal.needs for name, signal in SIGNALS.items())
    assert all(signal.unit for signal in SIGNALS.values() if signal.map is not None)


def test_available_signals_are_those_whose_needs_are_provided():
    assert available_signals(()) == ()
    of_reconstruction = ("residual", "local_residual", "focal_residual", "standardized_residual")
    assert available_signals(("reconstruction",)) == of_reconstruction
    assert "memory_distance" in available_signals(("query", "retrieved", "reconstruction"))


def test_threshold_comes_from_held_out_images():
    held = np.arange(1.0, 100.0)
    calibration = Calibration.fit({"residual": np.ones(3)}, {"residual": held})
    assert calibration.threshold("residual", 0.05) == 95.0
    assert np.mean(held > 95.0) <= 0.05
    assert Calibration.fit({"residual": np.ones(3)}).threshold("residual", 0.05) is None
    with pytest.raises(ValueError, match="false_positive_rate must lie strictly between 0 and 1, got 1"):
        calibration.threshold("residual", 1)


def test_standardized_signal_is_the_mean_squared_deviation_of_each_location():
    model, held = tiny.model(), tiny.images(40, 1)
    model.calibrate(tiny.images(8, 2), iter([held]))
    values = model.freeze().location_values(held)
    assert {name: x.shape for name, x in values.items()} == {
        "standardized_residual": (40, 256),
        "standardized_memory_distance": (40, 4),
    }
    fresh = tiny.images(5, 3)
    found, raw = model.signals(fresh), model.freeze().location_values(fresh)
    for name, normal in values.items():
        want = (((raw[name] - normal.mean(0)) / normal.std(0)) ** 2).mean(1)
        np.testing.assert_allclose(found[name], want, rtol=1e-6)
        for i in (0, 39):
            others = np.delete(normal, i, 0)
            by_others = (((normal[i] - others.mean(0)) / others.std(0)) ** 2).mean()
            assert model.calibration.holdout[name][i] == pytest.approx(by_others, rel=1e-6)
    error = (fresh.double() - model.reconstruct(fresh).double()).square()
    cells = error.view(5, 16, 3, 16, 3).mean((2, 4)).sqrt().flatten(1)
    np.testing.assert_allclose(raw["standardized_residual"], cells, rtol=1e-5)
    heat = model.maps(fresh, "standardized_residual")
    assert heat.shape == (5, 48, 48) and heat.mean((1, 2)).numpy() == pytest.approx(
        found["standardized_residual"], rel=0.2
    )


def test_few_held_out_images_leave_the_deviations_to_the_training_images(tmp_path):
    model, train = tiny.model(), tiny.images(12, 2)
    model.calibrate(train, tiny.images(9, 1))
    units = model.calibration.locations["standardized_residual"]
    np.testing.assert_allclose(units[0], model.freeze().location_values(train)["standardized_residual"].mean(0))
    model.save(tmp_path)
    loaded = Model.load(tmp_path)
    assert loaded.calibration.locations == model.calibration.locations
    images = tiny.images(3, 4)
    assert np.array_equal(
        loaded.signals(images)["standardized_residual"], model.signals(images)["standardized_residual"]
    )


def test_images_of_another_site_replace_the_deviations_only_where_they_are_many():
    model, local = tiny.model(signal="residual"), tiny.images(40, 5)
    few = local[:9]
    model.calibrate(few, few)
    assert model.calibration.locations == {}
    model.calibrate(tiny.images(8, 2), local)
    former = model.calibration.locations
    model.calibrate(few, few)
    assert model.calibration.locations == former
    model.calibrate(local, local)
    held = model.calibration.holdout["standardized_residual"]
    assert model.calibration.locations == former and model.calibration.mean["standardized_residual"] == np.mean(held)


def test_few_images_of_a_new_site_calibrate_a_model_that_has_no_deviations_and_not_one_that_lacks_its_own():
    few, model = tiny.images(9), tiny.model(signal="standardized_residual")
    model.calibrate(few, few)
    assert "standardized_residual" in model.calibration.locations
    model.calibration = dataclasses.replace(model.calibration, locations={})
    with pytest.raises(InputError, match="calibrating standardized_residual takes at least 30 normal images"):
        model.calibrate(few, few)


def test_normal_images_of_the_same_kind_exceed_the_threshold_as_often_as_chosen():
    values = np.random.default_rng(0).normal(size=(4030, 256)) * np.linspace(1, 9, 256)
    held, fresh = values[:30], values[30:]
    scores = (((fresh - held.mean(0)) / held.std(0)) ** 2).mean(1)
    assert np.mean(judged_by_others(held)) == pytest.approx(scores.mean(), rel=0.03)


@pytest.mark.parametrize("count", [30, 6])
def test_validation_standardizes_the_signal_that_chooses_the_epoch(count):
    model = tiny.model(signal="standardized_residual")
    records = tuple(Record(f"{i}", label=int(i >= count)) for i in range(count + 5))
    val = ImageSet(tiny.images(count + 5, 1), records)
    train = ImageSet(tiny.images(9, 3), tuple(Record(f"train {i}", label=0) for i in range(9)))
    found = validate(model, ProcessGroup(), val, train=train)
    assert "val_auc_standardized_memory_distance" not in found or count == 30
    values = model.freeze().location_values(val)["standardized_residual"]
    normal, abnormal = values[:count], values[count:]
    units = model.freeze().location_values(train)["standardized_residual"]
    scores = np.square((values - units.mean(0)) / units.std(0)).mean(1)
    if count == 30:
        deviations = (abnormal - normal.mean(0)) / normal.std(0)
        scores = np.concatenate([judged_by_others(normal), np.square(deviations).mean(1)])
    assert found["val_auc_standardized_residual"] == pytest.approx(metrics.auc(val.labels, scores).value)


def test_calibration_of_an_older_version_refuses_the_signals_it_did_not_measure():
    model = tiny.model(signal="residual")
    model.calibrate(tiny.images(8, 2))
    values = model.calibration.to_dict()
    del values["locations"], values["mean"]["standardized_residual"], values["std"]["standardized_residual"]
    model.calibration = Calibration.from_dict(values)
    assert model.score(tiny.images(2)).shape == (2,)
    with pytest.raises(
        InputError, match=r"got 'standardized_residual', which needs a new calibration: simsid calibrate"
    ):
        model.score(tiny.images(2), signal="standardized_residual")
    model.calibrate(tiny.images(8, 2))
    assert model.score(tiny.images(2), signal="standardized_residual").shape == (2,)


def test_calibration_without_locations_refuses_its_own_standardized_signal_until_it_is_calibrated_again():
    model = tiny.model(signal="standardized_residual")
    model.calibrate(tiny.images(8, 2))
    expected = model.score(tiny.images(2))
    values = model.calibration.to_dict()
    del values["locations"]
    model.calibration = Calibration.from_dict(values)
    with pytest.raises(InputError, match="needs a new calibration"):
        model.score(tiny.images(2))
    model.calibrate(tiny.images(8, 2))
    np.testing.assert_array_equal(model.score(tiny.images(2)), expected)


def test_before_a_calibration_a_standardized_residual_is_the_residual():
    found = tiny.model().signals(tiny.images(3))
    np.testing.assert_allclose(found["standardized_residual"], found["residual"], rtol=1e-6)


@pytest.mark.parametrize(
    ("locations", "message"),
    [
        ({"residual": [[0.0], [1.0]]}, "of standardized signals, got 'residual'"),
        ({"standardized_residual": [[0.0]]}, "by standardized signal"),
        ({"standardized_residual": [[0.0], [0.0]]}, "deviations greater than 0"),
        ({"standardized_residual": [[0.0, 1.0], [1.0]]}, "must be finite means"),
        ({"standardized_residual": [[float("nan")], [1.0]]}, "must be finite means"),
        ([], "by standardized signal"),
    ],
    ids=["no such signal", "no deviations", "zero", "lengths", "nan", "no mapping"],
)
def test_locations_of_a_calibration_that_do_not_fit_are_refused(locations, message):
    values = {"mean": {}, "std": {}, "count": 1, "holdout": {}, "locations": locations}
    with pytest.raises(InputError, match=message):
        Calibration.from_dict(values)


@pytest.mark.parametrize(
    ("fields", "locations", "message"),
    [
        ({}, {"standardized_residual": ([0.0], [1.0])}, "locations of standardized_residual must be 256, got 1"),
        ({"inpainting": "none"}, {"standardized_memory_distance": ([0.0], [1.0])}, "must be of the model's signals"),
    ],
    ids=["count", "signal"],
)
def test_model_file_with_locations_that_the_model_does_not_have_is_refused(tmp_path, fields, locations, message):
    model = tiny.model(**fields)
    model.calibrate(tiny.images(4))
    model.calibration = dataclasses.replace(model.calibration, locations=locations)
    model.save(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        Model.load(tmp_path)

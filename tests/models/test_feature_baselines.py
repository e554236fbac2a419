"""Published detectors on features: their definitions, and that they fit, score, save and load as any model."""

import json

import numpy as np
import pytest
import torch
from tiny_features import SIZES, TinyEncoder, abnormal, auc, normal

import simsid
from simsid.errors import CheckpointError, InputError
from simsid.models import FeatureKNN, LocationKNN, PaDiM, PatchCore
from simsid.models.feature_baselines import Gaussians, GlobalNeighbors, LocationNeighbors, PatchBank, greedy_coreset
from simsid.models.feature_config import FeatureConfig
from simsid.models.feature_sample import FeatureSample

KINDS = (FeatureKNN, LocationKNN, PaDiM, PatchCore)
each = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)


def build(kind, **changes):
    return kind(encoder=TinyEncoder(), **{**SIZES, "inputs": "gray", **changes})


def sample(images=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean = [torch.randn(images, 4, generator=generator)]
    return FeatureSample(clean, None, None, torch.randn(images, 9, 6, generator=generator).half(), images)


def fitted(detector, data, **changes):
    found = detector(FeatureConfig(grid=3, **changes))
    found.fit(data)
    return found


@each
def test_abnormal_images_score_higher_and_the_map_shows_where(kind):
    model = build(kind).fit(normal(40))
    assert model.signal_names == (kind.kind,) and kind.__name__ in simsid.models.__all__
    low, high = model.signals(normal(20, 2))[kind.kind], model.signals(abnormal(20))[kind.kind]
    assert auc(low, high) > 0.95
    assert model.map_names == (() if kind is FeatureKNN else (kind.kind,))
    for name in model.map_names:
        found = model.maps(abnormal(6), name)
        assert (found[:, :16, :16].mean((1, 2)) > found[:, 16:, 16:].mean((1, 2))).all()


@each
def test_loaded_baseline_scores_bit_for_bit_and_independent_of_the_batch(kind, tmp_path):
    model = build(kind).fit(normal(12), normal(9, 4))
    model.save(tmp_path)
    again = simsid.load(tmp_path, encoder=TinyEncoder())
    images = torch.cat([normal(5, 3), abnormal(2)])
    whole = model.signals(images)[kind.kind]
    assert type(again) is kind and again.identity() == model.identity()
    assert np.array_equal(again.signals(images)[kind.kind], whole)
    assert np.array_equal(model.signals(images[4:])[kind.kind], whole[4:])
    assert len(again.calibration.holdout[kind.kind]) == 9
    with pytest.raises(CheckpointError, match="encoder=module"):
        simsid.load(tmp_path)


@each
def test_calibration_judges_no_image_by_a_detector_that_holds_it(kind):
    model = build(kind).fit(normal(40))
    in_sample, fresh = (model.signals(images)[kind.kind].mean() for images in (normal(40), normal(40, 8)))
    mean, std = model.calibration.mean[kind.kind], model.calibration.std[kind.kind]
    assert in_sample < mean
    assert abs(fresh - mean) < 1.5 * std


@each
def test_baseline_that_is_not_fitted_says_so(kind, tmp_path):
    with pytest.raises(InputError, match="learned nothing yet"):
        build(kind).signals(normal(2))
    with pytest.raises(InputError, match="learned nothing yet"):
        build(kind).save(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": {"rows": [3]}}, "shapes must name the tensors"),
        ({"shapes": None}, "shapes must name the tensors"),
        ({"shapes": {"mean": [14], "std": [14], "rows": [13, 14]}}, "tensor rows must have the shape"),
        ({"shapes": {"mean": [14], "std": "all", "rows": [12, 14]}}, "sizes must be whole numbers"),
    ],
    ids=["other names", "none", "other shape", "no shape"],
)
def test_document_that_does_not_fit_is_a_checkpoint_error(tmp_path, change, message):
    build(FeatureKNN).fit(normal(12)).save(tmp_path)
    document = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**document, **change}))
    with pytest.raises(CheckpointError, match=message):
        simsid.load(tmp_path, encoder=TinyEncoder())


def test_global_neighbors_average_the_nearest_distances():
    data = sample()
    found = fitted(GlobalNeighbors, data, neighbors=3)
    query = torch.randn(1, 4, generator=torch.Generator().manual_seed(5))
    x = data.clean[0]
    distances = ((query - x) / (x.std(0) + 1e-6)).norm(dim=1).sort().values[:3]
    assert found([query], data.grid[:1]).item() == pytest.approx(distances.mean().item(), rel=1e-4)


def test_location_neighbors_compare_the_same_location_only():
    data, query = sample(), sample(1, seed=3).grid.float()
    found = fitted(LocationNeighbors, data, neighbors=2)([], query)[0]
    for i in range(9):
        want = (data.grid[:, i].float() - query[0, i]).norm(dim=1).sort().values[:2].mean()
        assert found[i].item() == pytest.approx(want.item(), rel=1e-3)


def test_gaussians_measure_the_mahalanobis_distance_of_chosen_channels():
    data, query = sample(), sample(1, seed=3).grid.float()
    detector = fitted(Gaussians, data, components=4)
    assert len(detector.chosen) == 4
    x = data.grid[:, 5, detector.chosen].double().numpy()
    covariance = np.cov(x.T) + 0.01 * np.eye(4)
    centered = query[0, 5, detector.chosen].double().numpy() - x.mean(0)
    want = np.sqrt(centered @ np.linalg.inv(covariance) @ centered)
    assert detector([], query)[0, 5].item() == pytest.approx(want, rel=1e-3)


def test_patch_bank_finds_the_nearest_patch_wherever_it_lies():
    data = sample(100)
    detector = fitted(PatchBank, data)
    assert detector.rows.shape == (9, 6), "one in a hundred of 900 patches"
    query = detector.rows.float().flip(0)[None]  # at other locations
    assert detector([], query).max() < 1e-2
    assert detector([], query + 5).min() > 5


def test_greedy_coreset_takes_the_farthest_patch_each_time():
    points = torch.cat([torch.zeros(50, 3), torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0]])])
    assert set(greedy_coreset(points, 4, seed=0).tolist()) == {0, 50, 51, 52}

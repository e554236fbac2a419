"""The evaluation under simulated shifts of the images."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_features import abnormal, memory, normal

from simsid import robustness
from simsid.data import ImageSet, Record
from simsid.errors import InputError
from simsid.evaluation import evaluate
from simsid.robustness import SHIFTS, evaluate_shifts, format_shifts, shifted

BY_NAME = {shift.name: shift for shift in SHIFTS}


def image_set(*parts):
    pixels = ((torch.cat(parts) + 1) * 127.5).round().to(torch.uint8)
    labels = [i > 0 for i, part in enumerate(parts) for _ in part]
    return ImageSet(pixels, tuple(Record(f"{i}.png", label=int(label)) for i, label in enumerate(labels)))


@pytest.fixture(scope="module")
def images():
    return image_set(normal(10, 3), abnormal(6))


@pytest.fixture(scope="module")
def model():
    return memory().fit(normal(16), normal(20, 5))


def change(images, name, strength):
    return torch.cat(list(shifted(images, BY_NAME[name], strength)))


def test_gray_values_are_changed_as_the_strength_says(images):
    unit = (images.batch(slice(None)) + 1) / 2
    torch.testing.assert_close(change(images, "gamma", 2.0), unit**2 * 2 - 1)
    mean = unit.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(change(images, "contrast", 0.5), (unit + mean) - 1, atol=1e-6, rtol=0)
    assert change(images, "contrast", 2.0).abs().max() <= 1


def test_blur_has_its_sigma_at_224_pixels():
    point = torch.zeros(1, 1, 224, 224)
    point[0, 0, 112, 112] = 1
    blurred = BY_NAME["blur"].apply(point, 2.0, torch.zeros(1, 5))
    rows = torch.arange(224.0) - 112
    assert (blurred.sum((0, 1, 3)) * rows**2).sum().sqrt().item() == pytest.approx(2.0, rel=0.05)
    half = BY_NAME["blur"].apply(point[..., 56:168, 56:168], 2.0, torch.zeros(1, 5))
    assert (half.sum((0, 1, 3)) * rows[56:168] ** 2).sum().sqrt().item() == pytest.approx(1.0, rel=0.05)


def test_affine_moves_each_image_by_its_own_draws_and_repeats(images):
    once = change(images, "affine", 1.0)
    assert torch.equal(once, change(images, "affine", 1.0))
    still = images.batch(slice(None))
    torch.testing.assert_close(change(images, "affine", 0.0), still, atol=1e-5, rtol=0)
    moved_by = (once - still).abs().mean((1, 2, 3))
    assert moved_by.min() > 0 and moved_by.max() > 1.5 * moved_by.min()


def test_jpeg_is_that_of_pillow_and_coarser_at_lower_quality(images):
    file = io.BytesIO()
    Image.fromarray(images.pixels[0, 0].numpy()).save(file, "JPEG", quality=10)
    want = torch.from_numpy(np.array(Image.open(file)))
    assert torch.equal(((change(images, "JPEG", 10)[0, 0] + 1) * 127.5).round().to(torch.uint8), want)
    error = [(change(images, "JPEG", quality) - images.batch(slice(None))).square().mean() for quality in (50, 10)]
    assert error[0] < error[1]


def test_every_shift_is_measured_at_the_threshold_of_unshifted_images(model, images):
    plain = evaluate(model, images, false_positive_rate=0.1)
    rows = evaluate_shifts(model, images, plain)
    assert len(rows) == 3 * (1 + sum(len(shift.strengths) for shift in SHIFTS))
    first = rows[0]
    want = next(row for row in plain.rows() if row.finding is None)
    assert (first.shift, first.signal, first.auc) == ("none", "combined", want.auc)
    assert (first.false_positive_rate, first.sensitivity) == (want.false_positive_rate, want.sensitivity)
    row = next(row for row in rows if (row.shift, row.strength, row.signal) == ("contrast", 0.5, "combined"))
    scores = model.signals(change(images, "contrast", 0.5))["combined"]
    flagged = scores > model.calibration.threshold("combined", 0.1)
    assert row.false_positive_rate == flagged[:10].mean() > first.false_positive_rate
    assert row.sensitivity == flagged[10:].mean()
    text = format_shifts(rows, "combined")
    assert len(text.splitlines()) == 3 + 1 + sum(len(shift.strengths) for shift in SHIFTS)
    assert f"contrast       0.5{row.auc:8.3f}" in text
    json.dumps([dataclasses.asdict(row) for row in rows])


def test_evaluation_of_other_images_is_refused(model, images):
    plain = evaluate(model, images)
    with pytest.raises(InputError, match="evaluation must be of these 3 images, got one of 16 others"):
        evaluate_shifts(model, images.select([0, 1, 14]), plain)


def test_model_without_held_out_images_has_no_rates(model, images, monkeypatch):
    monkeypatch.setattr(robustness, "SHIFTS", SHIFTS[:1])
    plain = dataclasses.replace(evaluate(model, images), holdout=None)
    rows = evaluate_shifts(model, images, plain)
    assert {row.false_positive_rate for row in rows} == {None}
    assert " - " in format_shifts(rows, "pooled_memory").splitlines()[3]

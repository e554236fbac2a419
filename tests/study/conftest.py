"""DigitAnatomy and its networks at the smallest sizes."""

import pytest

from simsid.study import images, plan

SMALL_DIGITS = {"train": 16, "val": 4, "test_normal": 5, "test_anomalous": 4}
SMALL_GEOMETRY = {"image_size": 48, "patches": 3, "levels": 2, "items": 8, "decoder_items": 8}


@pytest.fixture
def small(monkeypatch):
    """The default data and the sizes of networks on it, small."""
    monkeypatch.setattr(images, "DIGITS", SMALL_DIGITS)
    monkeypatch.setattr(plan, "DIGIT_GEOMETRY", {**plan.DIGIT_GEOMETRY, **SMALL_GEOMETRY})

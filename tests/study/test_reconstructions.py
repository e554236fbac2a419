"""The picture of one image of each kind and its reconstructions by every model."""

import numpy as np
import pytest
import torch

from simsid.data import ImageSet, Record
from simsid.models import PixelKNN, PixelPCA
from simsid.study import StudyImages, reconstructions

pytestmark = pytest.mark.usefixtures("small")


def test_every_model_that_reconstructs_has_a_row_and_every_kind_a_column(tmp_path):
    images = StudyImages(None)
    for name, kind in (("pixel_knn", PixelKNN), ("pixel_pca", PixelPCA), ("other", PixelPCA)):
        model = kind(image_size=96)
        model.fit(images.train(model.preprocessing)).save(tmp_path / name)
    folders = {name: tmp_path / name for name in ("pixel_knn", "pixel_pca", "other")}
    figure, left_out = reconstructions.draw(folders, images)
    assert left_out == ["pixel_knn"]
    grid = np.array(figure.axes).reshape(3, 5)
    assert [axes.get_title(loc="center") for axes in grid[0]] == ["normal", "flipped", "misordered", "missing", "zero"]
    assert [line[0].get_ylabel() for line in grid] == ["input", "pixel_pca", "other"]
    shown = grid[1, 2].get_images()[0].get_array()
    evaluated = images.evaluated(model.preprocessing)
    chosen = [i for i, finding in enumerate(evaluated.findings) if finding == "misordered"][:1]
    expected = model.pictures(evaluated.batch(chosen))["reconstruction"][0]
    np.testing.assert_allclose(shown, expected, atol=1e-5)
    figure, left_out = reconstructions.draw({"pixel_knn": tmp_path / "pixel_knn"}, images)
    assert figure is None and left_out == ["pixel_knn"]


def test_first_image_of_each_kind_is_shown_and_of_many_kinds_the_first_five():
    labels = [1, 0, 1, 0, *[1] * 7]
    findings = ["mass", "NORMAL", "mass", "NORMAL", "", *"bcdefg"]
    records = tuple(Record(f"{i}", label=a, finding=b) for i, (a, b) in enumerate(zip(labels, findings)))
    chosen = reconstructions.first_of_each_kind(ImageSet(torch.zeros(11, 1, 8, 8), records))
    assert chosen == {"normal": 1, "abnormal": 4, "b": 5, "c": 6, "d": 7, "e": 8}

"""The images of a study: splits, contamination, and what is refused."""

import dataclasses

import numpy as np
import pytest
import tiny

from simsid.data import Preprocessing
from simsid.errors import InputError
from simsid.study import StudyImages

pytestmark = pytest.mark.usefixtures("small")

SIZE = Preprocessing(16)


def test_default_data_is_evaluated_on_its_test_images_with_normal_validation_images():
    images = StudyImages(None, most=6)
    assert (images.name, images.split, images.train_count, images.evaluated_counts) == (
        "DigitAnatomy",
        "test",
        6,
        (5, 4),
    )
    assert len(images.train(SIZE)) == 6 and set(images.train(SIZE).labels) == {0}
    assert set(images.val(SIZE, labeled=False).labels) == {0} and set(images.val(SIZE, labeled=True).labels) == {0, 1}
    assert images.train(SIZE) is images.train(SIZE)


def test_a_folder_without_test_images_is_evaluated_on_its_validation_images(tmp_path):
    folder = tiny.zhanglab(tmp_path / "chest_xray", train=10, val=4)
    assert StudyImages(folder).split == "test"
    for path in (folder / "test").rglob("*.png"):
        path.unlink()
    images = StudyImages(folder, most=3)
    assert (images.name, images.split, images.train_count) == ("chest_xray", "val", 3)
    assert images.evaluated_counts[1] == 4
    assert images.evaluated(SIZE).paths == images.val(SIZE, labeled=True).paths


@pytest.mark.parametrize(("share", "abnormal"), [(1.0, 0), (0.9, 2), (0.5, 8)])
def test_contaminated_training_images_keep_their_number_and_are_all_labeled_normal(share, abnormal):
    images = StudyImages(None, contaminated=True)
    train = images.train(SIZE, share, seed=1)
    assert len(train) == 16 and set(train.labels) == {0}
    assert sum(record.finding != "NORMAL" for record in train.records) == abnormal
    assert len(set(train.paths)) == 16
    if abnormal:
        assert train.paths != images.train(SIZE, share, seed=2).paths
        assert train.paths == images.train(SIZE, share, seed=1).paths


def test_abnormal_training_images_of_a_folder_are_used_and_too_few_are_refused(tmp_path):
    folder = tiny.zhanglab(tmp_path / "chest_xray", train=10, val=4)
    images = StudyImages(folder, contaminated=True)
    kept = images.train(SIZE, 1 - 2 / images.train_count)
    assert sum("person" in path for path in kept.paths) == 2 and len(kept.sha256) == len(kept)
    with pytest.raises(InputError, match="has 2 abnormal training images, and 4 are needed"):
        images.train(SIZE, 0.5)
    for path in (folder / "train" / "PNEUMONIA").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="needs abnormal training images"):
        StudyImages(folder, contaminated=True)


def test_unlabeled_images_are_refused(tmp_path):
    tiny.films(tmp_path / "films", 6)
    with pytest.raises(InputError, match="evaluation needs"):
        StudyImages(tmp_path / "films")


def test_the_subset_of_training_images_is_the_same_for_every_size():
    images = StudyImages(None, most=5)
    small, large = images.train(SIZE), images.train(dataclasses.replace(SIZE, image_size=32))
    assert small.paths == large.paths and np.all(np.diff([int(path[-5:]) for path in small.paths]) > 0)

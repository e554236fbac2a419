"""DigitAnatomy: what is in the cells, that splits are disjoint, and MNIST's files."""

import gzip
import struct
import time

import numpy as np
import pytest
import torch

import simsid.data.digits as digits
from simsid.data import DigitAnatomy
from simsid.errors import InputError

SMALL = {"train": 30, "val": 8, "test_normal": 6, "test_anomalous": 12}


@pytest.fixture(scope="module")
def small():
    return DigitAnatomy(**SMALL)


def cells(image):
    """`[9, 32, 32]` in reading order."""
    return image.reshape(3, 32, 3, 32).transpose(0, 2, 1, 3).reshape(9, 32, 32)


def test_sizes_labels_and_findings(small):
    train, val, test = (small.load(split) for split in ("train", "val", "test"))
    assert train.pixels.shape == (30, 1, 96, 96)
    assert train.pixels.dtype == torch.uint8
    assert set(train.labels) == {0}
    assert set(train.findings) == {"NORMAL"}
    assert val.findings == ["NORMAL"] * 8 + list(digits.KINDS) * 2
    assert test.findings == ["NORMAL"] * 6 + list(digits.KINDS) * 3
    assert test.labels.tolist() == [0] * 6 + [1] * 12
    assert test.paths[:2] == ["digits/test/00000", "digits/test/00001"]
    assert len(small.load()) == len(small) == len(small.records) == 30 + 16 + 18
    assert len({record.path for record in small.records}) == len(small)


def test_anomalous_training_images_are_drawn_only_where_they_are_asked_for():
    contaminated = DigitAnatomy(**SMALL, train_anomalous=8).load("train")
    assert contaminated.labels.tolist() == [0] * 30 + [1] * 8
    assert contaminated.findings[30:] == list(digits.KINDS) * 2
    with pytest.raises(InputError, match="train images must not be negative, got 30 and -1"):
        DigitAnatomy(**SMALL, train_anomalous=-1)


def test_the_default_is_made_in_seconds_and_has_the_sizes_it_says():
    DigitAnatomy(**SMALL)
    start = time.process_time()
    dataset = DigitAnatomy()
    assert time.process_time() - start < 8
    counts = {split: len(dataset.select(split)) for split in ("train", "val", "test")}
    assert counts == {"train": 2000, "val": 200, "test": 600}
    kinds = [record.finding for record in dataset.select("test")]
    assert {kind: kinds.count(kind) for kind in kinds} == {"NORMAL": 200} | dict.fromkeys(digits.KINDS, 100)


def test_seed_decides(small):
    again, other = DigitAnatomy(**SMALL), DigitAnatomy(1, **SMALL)
    assert torch.equal(again.load().pixels, small.load().pixels)
    assert again.records == small.records
    assert not torch.equal(other.load().pixels, small.load().pixels)


def test_light_on_black_and_no_two_alike(small):
    pixels = small.load("train").pixels
    assert pixels.max() == 255
    assert (pixels == 0).float().mean() > 0.5
    assert len(torch.unique(pixels.flatten(1), dim=0)) == 30


def test_cells_vary_in_sample_and_scale(small):
    images = small.load("train").pixels[:, 0].numpy()
    for place in range(9):
        extent = [np.ptp(np.flatnonzero(cells(image)[place].max(1) > 60)) for image in images]
        assert max(extent) > 1.6 * min(extent)


def draw_one(finding, monkeypatch):
    """The content of 400 grids of one finding: digits shown, mirrored, upside down."""
    grids = []
    original = digits._make_anomalous

    def spy(kind, shown, mirrored, upside_down, rng):
        original(kind, shown, mirrored, upside_down, rng)
        grids.append((shown.copy(), mirrored.copy(), upside_down.copy()))

    monkeypatch.setattr(digits, "_make_anomalous", spy)
    images = np.ones((10, 8, 8), np.float32)
    drawn = digits._draw([finding] * 400, images, np.arange(10), 24.0, np.random.default_rng(0))
    return grids, drawn


RIGHT = np.arange(1, 10)


def test_missing_blanks_one_to_three_cells(monkeypatch):
    grids, drawn = draw_one("missing", monkeypatch)
    changed = [np.flatnonzero(shown != RIGHT) for shown, _, _ in grids]
    assert {len(places) for places in changed} == {1, 2, 3}
    assert set(np.concatenate(changed)) == set(range(9))
    for places, image in zip(changed, drawn):
        assert np.array_equal(np.flatnonzero(cells(image).max((1, 2)) == 0), places)


def test_zero_puts_zeros_in_one_to_three_cells(monkeypatch):
    grids, _ = draw_one("zero", monkeypatch)
    changed = [np.flatnonzero(shown != RIGHT) for shown, _, _ in grids]
    assert {len(places) for places in changed} == {1, 2, 3}
    assert all((shown[places] == 0).all() for (shown, _, _), places in zip(grids, changed))


def test_misordered_exchanges_two_or_three_and_keeps_the_set(monkeypatch):
    grids, _ = draw_one("misordered", monkeypatch)
    assert {int((shown != RIGHT).sum()) for shown, _, _ in grids} == {2, 3}
    assert all(set(shown) == set(RIGHT) for shown, _, _ in grids)


def test_flipped_changes_only_digits_that_show_it(monkeypatch):
    grids, _ = draw_one("flipped", monkeypatch)
    assert all(np.array_equal(shown, RIGHT) for shown, _, _ in grids)
    assert {int((mirrored | upside).sum()) for _, mirrored, upside in grids} == {1, 2, 3}
    mirrored = {digit for shown, left_right, _ in grids for digit in shown[left_right]}
    upside_down = {digit for shown, _, upside in grids for digit in shown[upside]}
    assert mirrored == {2, 3, 4, 5, 6, 7, 9}
    assert upside_down == {2, 4, 5, 6, 7, 9}


def test_flips_are_along_the_right_axes(monkeypatch):
    glyph = np.zeros((10, 8, 8), np.float32)
    glyph[:, :4, :4] = 1  # upper left

    def depart(kind, shown, mirrored, upside_down, rng):
        mirrored[0] = upside_down[1] = True

    monkeypatch.setattr(digits, "_make_anomalous", depart)
    (image,) = digits._draw(["flipped"], glyph, np.arange(10), 24.0, np.random.default_rng(0))
    quadrants = cells(image)[:3].reshape(3, 2, 16, 2, 16).mean((2, 4)).reshape(3, 4)
    assert quadrants.argmax(1).tolist() == [1, 2, 0]


def test_splits_use_disjoint_digit_images():
    parts = digits._bundled_digits(np.random.default_rng(0))
    seen = {split: {image.tobytes() for image in images} for split, (images, _) in parts.items()}
    assert sum(len(images) for images, _ in parts.values()) == 1797
    names = list(seen)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not seen[one] & seen[other]
    for _, labels in parts.values():
        assert np.bincount(labels, minlength=10).min() > 20


def test_resampling_is_centred_scaled_and_keeps_brightness():
    for size, width in ((8, 24.0), (8, 14.4), (28, 16.8), (28, 28.0)):
        matrix = digits._resampling(size, np.array(width))
        assert matrix.shape == (32, size)
        # Every output pixel well inside the digit's image is a weighted mean.
        inside = np.abs(np.arange(32) - 15.5) < width / 2 - 2.5 * max(1, width / size)
        assert inside.sum() > 3
        assert np.allclose(matrix[inside].sum(1), 1, atol=1e-5)
        assert np.allclose(matrix, matrix[::-1, ::-1], atol=1e-6)
        position = matrix @ (np.arange(size) - (size - 1) / 2)
        slope = np.polyfit(np.flatnonzero(inside), position[inside], 1)[0]
        assert slope == pytest.approx(size / width, rel=0.01)


def test_a_digit_is_recognised_in_its_cell(small):
    """The first cell of a normal image is a one, the last a nine, as the digit's own images say."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    means = np.stack([bunch.images[bunch.target == digit].mean(0) for digit in range(10)]) / 16
    matrix = digits._resampling(8, np.array(24 * 0.95))
    templates = np.stack([(matrix @ mean @ matrix.T).ravel() for mean in means])
    templates -= templates.mean(1, keepdims=True)
    templates /= np.linalg.norm(templates, axis=1, keepdims=True)
    right = []
    for image in small.load("train").pixels[:, 0].numpy():
        patches = cells(image).reshape(9, -1).astype(float)
        right.append((templates @ (patches - patches.mean(1, keepdims=True)).T).argmax(0) == RIGHT)
    # Templates of one scale name a good half; chance is a tenth.
    assert np.mean(right) > 0.5


def test_load_takes_the_options_of_load_images(small):
    images = small.load("val", 48, workers=3, progress=True, aspect="pad", intensity="minmax")
    assert images.image_size == (48, 48)
    assert small.load("val", (96, 192), aspect="pad").pixels[:, :, :, :48].max() == 0
    with pytest.raises(TypeError, match="'size'"):
        small.load("val", size=3)
    with pytest.raises(ValueError, match="has no 'nope' split"):
        small.load("nope")


def test_numbers_are_checked():
    with pytest.raises(ValueError, match="val images must not be negative"):
        DigitAnatomy(val=-1)
    assert len(DigitAnatomy(train=3, val=0, test_normal=0, test_anomalous=0)) == 3


def write_idx(path, values, opener):
    with opener(path, "wb") as file:
        file.write(bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}i", *values.shape) + values.tobytes())


@pytest.fixture
def mnist(tmp_path):
    """Files in MNIST's format; the training images are all bright in the left half, the test images in the right."""
    rng = np.random.default_rng(0)
    for part, count, columns in (("train", 200, slice(4, 14)), ("t10k", 100, slice(14, 24))):
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 4:24, columns] = rng.integers(100, 256, (count, 20, 10))
        opener, suffix = (gzip.open, ".gz") if part == "train" else (open, "")
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{suffix}", images, opener)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{suffix}", (np.arange(count) % 10).astype(np.uint8), opener)
    return tmp_path


def test_mnist_files_are_used(mnist):
    dataset = DigitAnatomy(mnist=mnist, train=5, val=2, test_normal=3, test_anomalous=0)
    for split, bright in (("train", 0), ("test", 1)):
        for image in dataset.load(split).pixels[:, 0].numpy():
            halves = cells(image)[:, :, :16].mean(), cells(image)[:, :, 16:].mean()
            assert np.argmax(halves) == bright


def test_damaged_or_absent_mnist(mnist):
    labels = mnist / "t10k-labels-idx1-ubyte"
    data = labels.read_bytes()
    labels.write_bytes(data[:-5])
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte is not an idx file"):
        DigitAnatomy(mnist=mnist)
    labels.write_bytes(b"\0\0\x0d\1" + data[4:])
    with pytest.raises(ValueError, match="wrong magic"):
        DigitAnatomy(mnist=mnist)
    labels.write_bytes(data[:8] + b"\x0b" + data[9:])
    with pytest.raises(ValueError, match="one label of 0 to 9"):
        DigitAnatomy(mnist=mnist)
    labels.unlink()
    with pytest.raises(ValueError, match="has no MNIST file t10k-labels"):
        DigitAnatomy(mnist=mnist)

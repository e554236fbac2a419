"""DigitAnatomy: digits in a fixed arrangement stand for anatomy, deviations from it for disease."""

import gzip
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simsid.arguments import require_whole_number
from simsid.data.datasets import Dataset, Path
from simsid.data.images import ImageSet
from simsid.data.preprocessing import ImageSize, Preprocessing
from simsid.data.reading import DecodedImage
from simsid.data.records import Record
from simsid.errors import InputError, InputTypeError

KINDS = ("missing", "misordered", "flipped", "zero")
CELL = 32
GRID = 3
SCALES = (0.6, 1.3)

_RIGHT_ORDER = np.arange(1, GRID * GRID + 1)
_BLANK = -1
# Width of a digit at scale 1, pixels. Digits of scikit-learn fill their 8 x 8 image, so that 24 keeps the largest (31)
# inside its cell; those of MNIST have a margin of 4 in 28.
_WIDTH_OF_SMALL, _WIDTH_OF_MNIST = 24.0, 28.0
# Digits that mirroring (left and right) or turning upside down does not change visibly.
_SAME_MIRRORED, _SAME_UPSIDE_DOWN = (1, 8), (1, 3, 8)
# Grids drawn together; the filters of more would not fit into the cache of a CPU.
_CHUNK = 16
_FRACTIONS = {"train": 0.6, "val": 0.15, "test": 0.25}


class DigitAnatomy(Dataset):
    """Grids of 3 x 3 handwritten digits, 96 x 96 pixels, light on black.

    A normal image has one to nine in order. An anomalous image differs in one to three cells: `"missing"` blanks them,
    `"misordered"` exchanges two or three, `"flipped"` mirrors them or turns them upside down (only digits that this
    changes), `"zero"` puts a zero there. Every cell holds another random sample of its digit, scaled by a random factor
    of 0.6 to 1.3. `train`, `val` and `test` draw from disjoint digit images.

    Source: SQUID paper (arXiv 2111.13495), section 4, which uses MNIST. Here the default is the 1797 digits that come
    with scikit-learn, so that nothing is downloaded; `mnist` names a folder with the MNIST files.

    Args:
        seed: the same seed gives the same images.
        train: number of normal training images.
        train_anomalous: number of anomalous training images, for studies of contaminated training.
        val: number of normal validation images, and of anomalous ones.
        test_normal, test_anomalous: numbers of test images; the four kinds of anomalies are equally frequent.
        mnist: a folder with the four idx files of MNIST, gzipped or not; its test digits make `test`.
        preprocessing: see `Dataset`; None keeps 96 x 96.

    Raises:
        InputError: a negative number, or files of MNIST are missing or damaged.
    """

    def __init__(
        self,
        seed: int = 0,
        train: int = 2000,
        val: int = 100,
        test_normal: int = 200,
        test_anomalous: int = 400,
        mnist: Path | None = None,
        *,
        train_anomalous: int = 0,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        counts = {"train": (train, train_anomalous), "val": (val, val), "test": (test_normal, test_anomalous)}
        seed = require_whole_number("seed", seed, least=0)
        for name, (normal, anomalous) in counts.items():
            require_whole_number(f"the number of {name} images", normal)
            require_whole_number(f"the number of {name} images", anomalous)
            if normal < 0 or anomalous < 0:
                raise InputError(f"the number of {name} images must not be negative, got {normal} and {anomalous}")
        rng = np.random.default_rng(seed)
        digits = _bundled_digits(rng) if mnist is None else _mnist_digits(os.fspath(mnist), rng)
        width = _WIDTH_OF_SMALL if mnist is None else _WIDTH_OF_MNIST
        records: list[Record] = []
        parts: list[np.ndarray] = []
        for split, (normal, anomalous) in counts.items():
            findings = ["NORMAL"] * normal + [KINDS[i % len(KINDS)] for i in range(anomalous)]
            parts.append(_draw(findings, *digits[split], width, rng))
            records += [
                Record(f"digits/{split}/{i:05d}", split, int(finding != "NORMAL"), finding)
                for i, finding in enumerate(findings)
            ]
        super().__init__(records, "DigitAnatomy", preprocessing or Preprocessing(GRID * CELL))
        self._pixels = np.concatenate(parts)
        self._index = {record.path: i for i, record in enumerate(self.records)}

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one image as float32 `[1, H, W]` in -1..1, and its label as int64."""
        return self.load_records([self.records[index]], self.preprocessing)[0]

    def batches(self, size: int = 256) -> Iterator[Tensor]:
        """Yield all images as float32 `[b, 1, H, W]` in -1..1, `size` at a time."""
        return self.load_records(self.records, self.preprocessing).batches(size)

    def load(self, split: str | None = None, image_size: ImageSize | None = None, **options: Any) -> ImageSet:
        """Return the images of one split, or all.

        Args:
            split: see `select`.
            image_size: None is that of `preprocessing`.
            options: `aspect` and `intensity` as in `Preprocessing`; `workers`, `progress` and `max_pixels` of
                `load_images` are accepted and change nothing, because no file is read.
        """
        shaping = {name: options[name] for name in ("aspect", "intensity") if name in options}
        unknown = options.keys() - shaping.keys() - {"workers", "progress", "max_pixels"}
        if unknown:
            raise InputTypeError(f"load() got an unexpected option {sorted(unknown)[0]!r}")
        size = self.preprocessing.image_size if image_size is None else image_size
        return self.load_records(self.select(split), replace(self.preprocessing, image_size=size, **shaping))

    def load_records(self, records: Sequence[Record], preprocessing: Preprocessing) -> ImageSet:
        """Return the images of some of `records`, in their order."""
        images = (self._pixels[self._index[record.path]] for record in records)
        pixels = np.stack([preprocessing.quantize(_as_decoded(image)) for image in images])
        return ImageSet(torch.from_numpy(pixels)[:, None], tuple(records), sha256=("",) * len(records))


def _as_decoded(image: np.ndarray) -> DecodedImage:
    return DecodedImage(image, declared=(0.0, 255.0), for_display=True, bits=8, format="")


def _bundled_digits(rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return `{split: (images [n, 8, 8] in [0, 1], digits [n])}`, disjoint, every digit equally frequent in each."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return _divide(bunch.images.astype(np.float32) / 16, bunch.target, _FRACTIONS, rng)


def _mnist_digits(folder: str, rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    fractions = {name: _FRACTIONS[name] for name in ("train", "val")}
    digits = _divide(*_read_mnist(folder, "train"), fractions, rng)
    return {**digits, "test": _read_mnist(folder, "t10k")}


def _divide(
    images: np.ndarray, digits: np.ndarray, fractions: dict[str, float], rng: np.random.Generator
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Divide the images of every digit among the splits in the given proportions."""
    chosen: dict[str, list[np.ndarray]] = {name: [] for name in fractions}
    edges = np.cumsum(list(fractions.values())) / sum(fractions.values())
    for digit in range(10):
        indices = rng.permutation(np.flatnonzero(digits == digit))
        cuts = np.round(edges[:-1] * len(indices)).astype(int)
        for name, part in zip(fractions, np.split(indices, cuts)):
            chosen[name].append(part)
    joined = {name: np.concatenate(parts) for name, parts in chosen.items()}
    return {name: (images[index], digits[index]) for name, index in joined.items()}


def _read_mnist(folder: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    images = _read_idx(folder, f"{part}-images-idx3-ubyte", 3)
    digits = _read_idx(folder, f"{part}-labels-idx1-ubyte", 1)
    if len(images) != len(digits) or set(np.unique(digits)) != set(range(10)):
        raise InputError(f"{folder}: MNIST's {part} files do not hold one label of 0 to 9 for each image")
    return images.astype(np.float32) / 255, digits.astype(np.int64)


def _read_idx(folder: str, name: str, axes: int) -> np.ndarray:
    """Read an idx file of bytes: two zeros, type 8, the number of axes, their sizes as big-endian int32, the values."""
    for path, opener in ((name, open), (name + ".gz", gzip.open)):
        path = os.path.join(folder, path)
        if os.path.isfile(path):
            return _parse_idx(path, opener, axes)
    raise InputError(f"{folder} has no MNIST file {name} or {name}.gz")


def _parse_idx(path: str, opener: Callable[..., Any], axes: int) -> np.ndarray:
    try:
        with opener(path, "rb") as file:
            data = file.read()
        sizes = struct.unpack_from(f">{axes}i", data, 4)
        if data[:4] != bytes((0, 0, 8, axes)):
            raise InputError("wrong magic number")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(sizes)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise InputError(f"{path} is not an idx file of {axes} axes of bytes: {error}") from error


def _draw(
    findings: list[str], images: np.ndarray, digits: np.ndarray, width: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw one grid for each finding: `[n, 96, 96]` uint8."""
    cells = GRID * GRID
    shown = np.tile(_RIGHT_ORDER, (len(findings), 1))
    mirrored = np.zeros((len(findings), cells), bool)
    upside_down = np.zeros((len(findings), cells), bool)
    for i, finding in enumerate(findings):
        if finding != "NORMAL":
            _make_anomalous(finding, shown[i], mirrored[i], upside_down[i], rng)
    sample = np.zeros((len(findings), cells), int)
    for digit in range(10):
        cells_with_digit = shown == digit
        sample[cells_with_digit] = rng.choice(np.flatnonzero(digits == digit), cells_with_digit.sum())
    widths = width * rng.uniform(*SCALES, shown.shape)

    grids = np.empty((len(findings), GRID * CELL, GRID * CELL), np.uint8)
    for start in range(0, len(findings), _CHUNK):
        part = slice(start, start + _CHUNK)
        glyphs = images[sample[part]]
        glyphs = np.where(mirrored[part, :, None, None], glyphs[..., :, ::-1], glyphs)
        glyphs = np.where(upside_down[part, :, None, None], glyphs[..., ::-1, :], glyphs)
        glyphs[shown[part] == _BLANK] = 0
        filters = _resampling(images.shape[-1], widths[part])
        drawn = (filters @ glyphs @ filters.swapaxes(-1, -2)).reshape(-1, GRID, GRID, CELL, CELL)
        light = drawn.transpose(0, 1, 3, 2, 4).reshape(-1, GRID * CELL, GRID * CELL)
        grids[part] = np.rint(np.clip(light, 0, 1) * 255)
    return grids


def _make_anomalous(
    finding: str, shown: np.ndarray, mirrored: np.ndarray, upside_down: np.ndarray, rng: np.random.Generator
) -> None:
    """Turn one normal grid into an anomaly of this kind, in place."""
    cells = np.arange(len(shown))
    if finding == "missing":
        shown[rng.choice(cells, rng.integers(1, 4), replace=False)] = _BLANK
    elif finding == "zero":
        shown[rng.choice(cells, rng.integers(1, 4), replace=False)] = 0
    elif finding == "misordered":
        # A cyclic exchange leaves none of them in its cell.
        chosen = rng.choice(cells, rng.integers(2, 4), replace=False)
        shown[chosen] = shown[np.roll(chosen, 1)]
    else:
        changeable = cells[~np.isin(shown, _SAME_MIRRORED)]
        for cell in rng.choice(changeable, rng.integers(1, 4), replace=False):
            upside = shown[cell] not in _SAME_UPSIDE_DOWN and rng.random() < 0.5
            upside_down[cell], mirrored[cell] = upside, not upside


def _resampling(size: int, width: np.ndarray) -> np.ndarray:
    """Return matrices `[..., 32, size]` that draw `size` samples `width` pixels wide, centered in a cell.

    Keys' cubic kernel (a = -1/2), widened where the digit shrinks, so that it shows no steps and does not alias. Pixels
    outside the digit's image are black.
    """
    step = (size / width[..., None, None]).astype(np.float32)
    position = (np.arange(CELL, dtype=np.float32)[:, None] - (CELL - 1) / 2) * step + (size - 1) / 2
    # Black samples on both sides, as many as the digit has, let the weights of every row sum to one.
    x = np.abs(position - np.arange(-size, 2 * size, dtype=np.float32)) / np.maximum(step, 1)
    near = 1 + x * x * (1.5 * x - 2.5)
    far = 2 + x * (x * (2.5 - 0.5 * x) - 4)
    weights = np.where(x < 1, near, np.where(x < 2, far, np.float32(0)))
    total = weights.sum(-1, keepdims=True)
    return weights[..., size : 2 * size] / np.where(total > 0, total, np.float32(1))

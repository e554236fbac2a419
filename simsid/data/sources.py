"""Turns the objects that hold images (arrays, data sets, loaders) into batches or into one `ImageSet`."""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils import data

from simsid.data.datasets import Dataset
from simsid.data.images import ImageSet
from simsid.data.preprocessing import Preprocessing, value_range
from simsid.data.records import Record, failure_summary
from simsid.errors import InputError, InputTypeError

ACCEPTED = (
    "a float array [n, 1, H, W] in -1..1, an ImageSet, a torch Dataset, a DataLoader or an iterable of such batches"
)
# Images scaled to 0..1 have a pixel this dark somewhere; bright details in -1..1 almost never end just there.
DARKEST_SCALED = 0.02


def as_batches(source: object, size: int = 256, *, name: str = "images") -> Iterator[Tensor]:
    """Return an iterator over the images of `source`, float32 `[b, 1, H, W]` in -1..1, in order.

    Every batch has `size` images except the last, whatever batches the source comes in, and stays on its device.
    Labels that the source holds are dropped.

    Args:
        source: a tensor or NumPy array `[n, 1, H, W]`, an `ImageSet`, a data set of `simsid.data`, another torch
            `Dataset` (items: an image `[1, H, W]`, a tuple (image, label, ...) or a dict with `"image"`), a
            `DataLoader` of such items, or an iterable of batches (tensors, tuples or dicts likewise).
        name: what the error messages call the argument.

    Raises:
        InputTypeError: at the call, any other object; while iterating, an item or batch of another kind.
        InputError: a wrong shape or dtype, or values outside -1..1 (the message has the observed range).
        NonFiniteError: NaN or infinite values.
        ReadError: a file of a data set of `simsid.data` cannot be read.

    Warns:
        UserWarning: the darkest value of the whole source lies in 0..0.02. Images scaled to 0..1 look like that, and
            their black would be taken for mid-gray; it is not an error, because a very bright image might as well.
    """
    if size < 1:
        raise InputError(f"size must be at least 1, got {size}")
    if isinstance(source, (ImageSet, Dataset)):
        return source.batches(size)
    return _resized(_checked((images for images, _ in _parts(source, name)), name), size, name)


def as_image_set(
    source: object,
    *,
    name: str = "images",
    label: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> ImageSet:
    """Return the images of `source` as an `ImageSet` in memory, with the labels that the source holds.

    An `ImageSet` is returned as it is, a float32 array shares its memory. Arguments, errors and the warning are those
    of `as_batches`; in addition:

    Args:
        label: the label of images for which the source holds none: 0 normal, 1 abnormal, None unknown.
        preprocessing: how a data set of `simsid.data` is decoded; None is its own.

    Raises:
        InputError: no image, or a label other than 0, 1 and -1 (unknown).

    Warns:
        UserWarning: files of a data set of `simsid.data` could not be read; `ImageSet.failures` has them all.
    """
    if isinstance(source, ImageSet):
        return source
    if isinstance(source, Dataset):
        loaded = source.load(**(preprocessing or source.preprocessing).to_dict())
        if loaded.failures:
            warnings.warn(failure_summary(loaded.failures, len(source)), UserWarning, stacklevel=2)
        return loaded
    labels: list[int | None] = []

    def images() -> Iterator[Tensor]:
        for batch, own in _parts(source, name):
            labels.extend([label] * len(batch) if own is None else _labels(own, len(batch), name))
            yield batch

    batches = list(_checked(images(), name))
    if not batches:
        raise InputError(f"{name} must hold at least one image, got none")
    _check_one_size(batches, name)
    pixels = batches[0] if len(batches) == 1 else torch.cat(batches)
    return ImageSet(pixels, tuple(Record(f"{name}/{i}", label=value) for i, value in enumerate(labels)))


def _parts(source: object, name: str) -> Iterator[tuple[Tensor, object]]:
    """Return an iterator over (float32 images `[b, 1, H, W]`, labels or None); refuse other objects at the call."""
    if isinstance(source, (Tensor, np.ndarray)):
        return iter([(_images(source, name, 4), None)])
    if isinstance(source, data.IterableDataset):
        return (_item(item, name) for item in source)
    if isinstance(source, data.Dataset):
        if not hasattr(source, "__len__"):
            raise InputTypeError(f"{name} must be a Dataset with a length, got {type(source).__name__}")
        return (_item(source[i], name) for i in range(len(source)))
    if isinstance(source, (str, bytes, os.PathLike)):
        raise InputTypeError(
            f"{name} must be {ACCEPTED}, got the path {source!r}; use simsid.data.open_dataset or read"
        )
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        got = "None" if source is None else f"an object of type {type(source).__name__}"
        raise InputTypeError(f"{name} must be {ACCEPTED}, got {got}")
    return (_unpacked(batch, name, 4) for batch in source)


def _item(item: object, name: str) -> tuple[Tensor, object]:
    images, label = _unpacked(item, name, 3)
    return images[None], None if label is None else [label]


def _unpacked(part: object, name: str, axes: int) -> tuple[Tensor, object]:
    """Take images and labels from an image or batch, a tuple (images, labels, ...), or a dict with `"image"`."""
    if isinstance(part, Mapping) and "image" in part:
        return _images(part["image"], name, axes), part.get("label")
    if isinstance(part, (tuple, list)) and part and isinstance(part[0], (Tensor, np.ndarray)):
        return _images(part[0], name, axes), part[1] if len(part) > 1 else None
    if isinstance(part, (Tensor, np.ndarray)):
        return _images(part, name, axes), None
    what = "items" if axes == 3 else "batches"
    raise InputTypeError(
        f"the {what} of {name} must be arrays, tuples (image, label) or dicts with 'image', got {type(part).__name__}"
    )


def _images(images: Tensor | np.ndarray, name: str, axes: int) -> Tensor:
    """Check shape and dtype; return float32, sharing memory where it can."""
    shape = "[n, 1, H, W]" if axes == 4 else "[1, H, W] each"
    if images.ndim != axes or images.shape[-3] != 1 or 0 in images.shape[-2:]:
        raise InputError(f"{name} must have shape {shape}, got {list(images.shape)}")
    if isinstance(images, np.ndarray):
        if images.dtype.kind == "f":
            # Negative strides and read-only memory have no counterpart in PyTorch and are copied.
            return torch.from_numpy(np.require(images, np.float32, ["C", "W"]))
    elif images.is_meta or images.layout != torch.strided:
        raise InputTypeError(f"{name} must be a dense tensor with values, got {images.layout} on {images.device}")
    elif images.is_floating_point():
        return images.detach().to(torch.float32)
    raise InputError(
        f"{name} must be floating point in -1..1, from black to white, got {images.dtype}; "
        "for uint8 use images / 127.5 - 1; simsid.data.read maps raw gray values"
    )


def _labels(labels: object, count: int, name: str) -> list[int | None]:
    """Return one of 0, 1 and None (unknown) per image."""
    values = labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else labels
    values = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    numbers = [-1 if value is None else value for value in values]
    if len(numbers) != count or not all(number in (-1, 0, 1) for number in numbers):
        raise InputError(f"the labels of {name} must be one of 0, 1 and -1 for each image, got {values!r:.60}")
    return [None if number == -1 else int(number) for number in numbers]


def _checked(batches: Iterable[Tensor], name: str) -> Iterator[Tensor]:
    """Check the values of every batch, and warn at the end when they look scaled to 0..1."""
    low, high = np.inf, -np.inf
    for batch in batches:
        if len(batch):
            least, greatest = value_range(batch, name)
            low, high = min(low, least), max(high, greatest)
            yield batch
    if 0 <= low <= DARKEST_SCALED and low < high:
        warnings.warn(
            f"{name} lie in {low:g} to {high:g}, nothing darker than mid-gray in -1..1; if they are scaled to 0..1, "
            "use images * 2 - 1",
            UserWarning,
            stacklevel=3,
        )


def _resized(batches: Iterable[Tensor], size: int, name: str) -> Iterator[Tensor]:
    """Yield the same images in batches of `size`."""
    held: list[Tensor] = []
    count = 0
    for batch in batches:
        _check_one_size([*held[:1], batch], name)
        while count + len(batch) >= size:
            cut = size - count
            yield torch.cat([*held, batch[:cut]]) if held else batch[:cut]
            batch, held, count = batch[cut:], [], 0
        if len(batch):
            held.append(batch)
            count += len(batch)
    if held:
        yield torch.cat(held) if len(held) > 1 else held[0]


def _check_one_size(batches: list[Tensor], name: str) -> None:
    sizes = {tuple(batch.shape[2:]) for batch in batches}
    if len(sizes) > 1:
        (rows, columns), (other_rows, other_columns) = sorted(sizes)[:2]
        raise InputError(f"{name} must have one size, got {rows} x {columns} and {other_rows} x {other_columns} pixels")

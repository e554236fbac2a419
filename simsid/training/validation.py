"""What a training measures on images: checks before it, validation after an epoch, calibration at the end."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from simsid import metrics
from simsid.config import Config
from simsid.data import ImageSet, Preprocessing, as_image_set
from simsid.distributed import ProcessGroup
from simsid.errors import InputError
from simsid.models.calibration import Calibration, location_statistics, standardize_locations
from simsid.models.inference import FrozenModel
from simsid.models.model import Model
from simsid.models.scorer import Scorer
from simsid.models.signals import SIGNALS

MOST_TRAINING_IMAGES = 256
"""Training images that standardize locations after an epoch: a pass over all would take a large part of its time."""


def to_image_set(source: object, name: str, config: Config) -> ImageSet:
    """Read what the user passed as `name` into memory, prepared for a model; images without labels count as normal."""
    preprocessing = Preprocessing(config.image_size, config.aspect, config.intensity)
    return as_image_set(source, name=name, label=0, preprocessing=preprocessing)


def validate_images(train: ImageSet, val: ImageSet | None, image_size: int) -> None:
    """Refuse images that a model of `image_size` pixels cannot be trained on, before anything is written.

    Raises:
        InputError: images of another size, or fewer than 2 to train on.
    """
    for name, images in (("train", train), ("val", val)):
        if images is None:
            continue
        if tuple(images.pixels.shape[2:]) != (image_size, image_size):
            actual = " x ".join(map(str, images.pixels.shape[2:]))
            raise InputError(f"{name} images must be {image_size} x {image_size} pixels, as the model's, got {actual}")
    if len(train) < 2:
        raise InputError(f"training needs at least 2 images, got {len(train)}")


def choose_batch_size(batch_size: int, group: ProcessGroup, images: int) -> int:
    """Return the number of images in an iteration, which divide among the ranks: at most `batch_size`.

    Raises:
        InputError: the batch size does not divide, or there are fewer images than ranks.
    """
    if batch_size % group.size or images < group.size:
        raise InputError(
            f"the batch size must be a multiple of the {group.size} processes, with an image for each, "
            f"got batch_size={batch_size} and {images} images"
        )
    return min(batch_size, images // group.size * group.size)


def measure_signals(
    model: Scorer, group: ProcessGroup, images: ImageSet, names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Return signals of all images, by default every one, `[n]` float64 each, on every rank, each of which measures a
    shard of the images."""
    if group.size == 1:
        return model.signals(images, names)
    return group.interleave(model.signals(images.select(slice(group.rank, None, group.size)), names), len(images))


def paste_patches(images: ImageSet, seed: int = 0) -> ImageSet:
    """Return a copy of each image with a rectangle of it pasted at another place, labeled abnormal.

    The rectangle has 15 to 40 % of each side. Source: CutPaste (arXiv 2104.04015), section 2.1, without its jitter.
    """
    random = np.random.default_rng(seed)
    pixels = images.pixels.cpu().numpy().copy()
    for image in pixels[:, 0]:
        rows, columns = (max(int(side * random.uniform(0.15, 0.40)), 1) for side in image.shape)
        top, left = (random.integers(0, n - size + 1, 2) for n, size in zip(image.shape, (rows, columns)))
        source = image[top[0] : top[0] + rows, left[0] : left[0] + columns].copy()
        image[top[1] : top[1] + rows, left[1] : left[1] + columns] = source
    records = tuple(dataclasses.replace(record, label=1, finding="pasted") for record in images.records)
    return ImageSet(torch.from_numpy(pixels).to(images.pixels.device), records)


def validate(
    model: Model,
    group: ProcessGroup,
    val: ImageSet | None,
    pasted: ImageSet | None = None,
    train: ImageSet | None = None,
) -> dict[str, float]:
    """Return reconstruction error and memory distance of normal images, and AUCs where there are anomalies too.

    Every rank has running statistics of its own; those of rank 0 become the model's on all of them.

    Args:
        model: what is trained.
        group: the ranks, each of which measures a shard.
        val: images to validate on; None measures nothing.
        pasted: synthetic anomalies; with them each signal's AUC between the normal images of `val` and these too.
        train: training images, which standardize locations where `val` has fewer than 30 normal images.
    """
    if val is None:
        return {}
    group.broadcast_tensors(model.buffers())
    # Leave out signals that are not finite: they have no AUC, and JSON has no NaN.
    frozen = model.freeze(model._calibration_precision())
    abnormal = val.labels == 1
    judged = _standardize_by_normal_images(frozen, group, val, train)
    # The other standardized signals would not be standardized: no calibration is there yet.
    names = [name for name in frozen.signal_names if SIGNALS[name].locations is None or name in (*judged, model.signal)]
    signals = measure_signals(frozen, group, val, names)
    for name, values in judged.items():
        signals[name][~abnormal] = values
    signals = _finite(signals)
    result: dict[str, float] = {}
    for name, key in (("residual", "val_reconstruction"), ("memory_distance", "val_memory_distance")):
        if name in signals and not abnormal.all():
            result[key] = float(signals[name][~abnormal].mean())
    if abnormal.any() and not abnormal.all():
        for name, values in signals.items():
            result[f"val_auc_{name}"] = metrics.auc(abnormal.astype(int), values).value
    if pasted is not None:
        for name, values in _finite(measure_signals(frozen, group, pasted, names)).items():
            if name in signals:
                normal = signals[name][~abnormal]
                labels = np.repeat([0, 1], [len(normal), len(values)])
                result[f"val_synthetic_{name}"] = metrics.auc(labels, np.concatenate([normal, values])).value
    return result


def _standardize_by_normal_images(
    frozen: FrozenModel, group: ProcessGroup, val: ImageSet, train: ImageSet | None
) -> dict[str, np.ndarray]:
    """Standardize locations by the normal images of `val`, and return the signals of these, each judged by the others.

    Only where a standardized signal chooses the epoch, since it takes another pass over the images. With fewer than 30
    normal images locations are standardized by a sample of `train`, as a calibration does, and nothing is returned.
    """
    normal = val.labels != 1
    if SIGNALS[frozen.signal].locations is None or not normal.any():
        return {}
    sample = None if train is None else train.select(slice(None, None, -(-len(train) // MOST_TRAINING_IMAGES)))
    units, judged = standardize_locations(
        _location_values(frozen, group, val.select(normal)),
        lambda: {} if sample is None else location_statistics(_location_values(frozen, group, sample)),
    )
    frozen.set_location_units(units)
    return judged


def measure_items(model: Model) -> dict[str, float]:
    """Return the mean Euclidean norm of the in-painting memory's items, which weight decay may let fade."""
    block = model.student.inpainting
    return {} if block is None else {"item_norm": float(block.memory.items.detach().norm(dim=-1).mean())}


def _finite(signals: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values for name, values in signals.items() if np.isfinite(values).all()}


def calibrate(model: Model, group: ProcessGroup, train: ImageSet, val: ImageSet | None) -> None:
    """Calibrate a model on its training images, with the normal images of `val` held out for thresholds."""
    normal = np.flatnonzero(val.labels != 1) if val is not None else np.zeros(0, np.int64)
    precision = model._calibration_precision()
    frozen = model.freeze(precision)
    frozen.calibration = None  # one of an older version lacks signals that are measured now
    held = val.select(normal) if val is not None and len(normal) else None
    units, judged = standardize_locations(
        {} if held is None else _location_values(frozen, group, held),
        lambda: location_statistics(_location_values(frozen, group, train)),
    )
    frozen.set_location_units(units)
    holdout = None if held is None else {**measure_signals(frozen, group, held), **judged}
    model.calibration = Calibration.fit(measure_signals(frozen, group, train), holdout, precision, units)


def _location_values(model: Scorer, group: ProcessGroup, images: ImageSet) -> dict[str, np.ndarray]:
    """Return the values at each location, name to `[n, L]`, on every rank, which each measures a shard of them."""
    shards = group.all_gather_object(model.location_values(images.select(slice(group.rank, None, group.size))))
    joined = {}
    for name, first in shards[0].items():
        joined[name] = np.empty((len(images), first.shape[1]))
        for rank, shard in enumerate(shards):
            if name in shard:  # a rank without images has none
                joined[name][rank :: group.size] = shard[name]
    return joined

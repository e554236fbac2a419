"""What a training measures on images: checks before it, validation after an epoch, calibration at the end."""

import numpy as np

from simsid import metrics
from simsid.config import Config
from simsid.data import ImageSet, Preprocessing, as_image_set
from simsid.distributed import ProcessGroup
from simsid.errors import InputError
from simsid.models.base import Scorer
from simsid.models.calibration import Calibration
from simsid.models.model import Model


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


def measure_signals(model: Scorer, group: ProcessGroup, images: ImageSet) -> dict[str, np.ndarray]:
    """Return the signals of all images, `[n]` float64 each, on every rank; each rank measures a shard of them."""
    if group.size == 1:
        return model.signals(images)
    return group.interleave(model.signals(images.select(slice(group.rank, None, group.size))), len(images))


def validate(model: Model, group: ProcessGroup, val: ImageSet | None) -> dict[str, float]:
    """Return the reconstruction error of normal images, and each signal's AUC where there are anomalies too.

    Every rank has running statistics of its own; those of rank 0 become the model's on all of them.
    """
    if val is None:
        return {}
    group.broadcast_tensors(model.buffers())
    # Leave out signals that are not finite: they have no AUC, and JSON has no NaN.
    measured = measure_signals(model.freeze(), group, val)
    signals = {name: values for name, values in measured.items() if np.isfinite(values).all()}
    abnormal = val.labels == 1
    result: dict[str, float] = {}
    if "residual" in signals and not abnormal.all():
        result["val_reconstruction"] = float(signals["residual"][~abnormal].mean())
    if abnormal.any() and not abnormal.all():
        for name, values in signals.items():
            result[f"val_auc_{name}"] = metrics.auc(abnormal.astype(int), values).value
    return result


def calibrate(model: Model, group: ProcessGroup, train: ImageSet, val: ImageSet | None) -> None:
    """Calibrate a model on its training images, with the normal images of `val` held out for thresholds."""
    normal = np.flatnonzero(val.labels != 1) if val is not None else np.zeros(0, np.int64)
    frozen = model.freeze()
    holdout = measure_signals(frozen, group, val.select(normal)) if val is not None and len(normal) else None
    model.calibration = Calibration.fit(measure_signals(frozen, group, train), holdout)

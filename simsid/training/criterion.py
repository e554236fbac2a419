"""Which epoch of a training is kept."""

from collections.abc import Collection

import numpy as np

from simsid.config import TrainingConfig
from simsid.data import ImageSet
from simsid.errors import InputError
from simsid.training.state import History

VALUES: dict[str, tuple[str, int]] = {
    "auc": ("val_auc_{signal}", 1),
    "synthetic": ("val_synthetic_{signal}", 1),
    "reconstruction": ("val_reconstruction", -1),
    "memory_distance": ("val_memory_distance", -1),
    "last": ("epoch", 1),
}
"""The metric of an epoch that each criterion reads, and 1 where the largest is best, -1 where the smallest."""

LABEL_FREE = "reconstruction"
"""What `"auto"` means where validation has normal images alone; docs/training.md has the comparison."""


def choose_criterion(config: TrainingConfig, val: ImageSet | None, signals: Collection[str]) -> str:
    """Return a key of `VALUES`: the configured criterion, or the best that `val` can give.

    Args:
        config: its `criterion` is a key of `VALUES`, or "auto".
        val: images to validate on, or None.
        signals: the signals of the model.

    Raises:
        InputError: `val` lacks the normal or abnormal images that the configured criterion needs, or the model the
            memory distance.
    """
    abnormal = val.labels == 1 if val is not None else np.zeros(0, bool)
    both, normal = bool(abnormal.any() and not abnormal.all()), bool((~abnormal).any())
    if config.criterion == "auto":
        return "auc" if both else LABEL_FREE if normal else "last"
    if config.criterion == "auc" and not both:
        raise InputError(
            f'criterion "auc" needs normal and abnormal validation images, '
            f"got {int((~abnormal).sum())} normal and {int(abnormal.sum())} abnormal"
        )
    if config.criterion != "last" and not normal:
        raise InputError(f'criterion "{config.criterion}" needs normal validation images, got none')
    if config.criterion == "memory_distance" and "memory_distance" not in signals:
        raise InputError('criterion "memory_distance" needs a model with an in-painting block, got one without')
    return config.criterion


def choose_best(history: History, epoch: dict[str, float], criterion: str, signal: str) -> bool:
    """Return whether `epoch` is better than the best so far, and note it in the history.

    An epoch without a value (its signals were not finite) is kept only until one has a value.

    Args:
        history: the epochs before.
        epoch: what was measured after this one.
        criterion: as `choose_criterion` returned it.
        signal: the signal whose AUC counts.
    """
    name, sign = VALUES[criterion]
    measured = epoch.get(name.format(signal=signal))
    value = None if measured is None else float(sign * measured)
    if value is None:
        better = history.best_epoch is None
    else:
        better = history.best_value is None or value > history.best_value
    if better:
        history.best_epoch, history.best_value = int(epoch["epoch"]), value
    return better


def is_out_of_patience(history: History, config: TrainingConfig) -> bool:
    """Return whether the last `config.patience` epochs brought no better one."""
    best = history.best_epoch
    return bool(config.patience) and best is not None and len(history.epochs) - 1 - best >= config.patience

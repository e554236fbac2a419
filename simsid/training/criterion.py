"""Which epoch of a training is kept."""

import numpy as np

from simsid.config import TrainingConfig
from simsid.data import ImageSet
from simsid.errors import InputError
from simsid.training.state import History


def choose_criterion(config: TrainingConfig, val: ImageSet | None) -> str:
    """Return "auc", "reconstruction" or "last": the configured criterion, or the best that `val` can give.

    Raises:
        InputError: `val` lacks the normal or abnormal images that the configured criterion needs.
    """
    abnormal = val.labels == 1 if val is not None else np.zeros(0, bool)
    both, normal = bool(abnormal.any() and not abnormal.all()), bool((~abnormal).any())
    if config.criterion == "auto":
        return "auc" if both else "reconstruction" if normal else "last"
    if config.criterion == "auc" and not both:
        raise InputError(
            f'criterion "auc" needs normal and abnormal validation images, '
            f"got {int((~abnormal).sum())} normal and {int(abnormal.sum())} abnormal"
        )
    if config.criterion == "reconstruction" and not normal:
        raise InputError('criterion "reconstruction" needs normal validation images, got none')
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
    value: float | None
    if criterion == "last":
        value = float(epoch["epoch"])
    elif criterion == "auc":
        value = epoch.get(f"val_auc_{signal}")
    else:
        value = -epoch["val_reconstruction"] if "val_reconstruction" in epoch else None
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

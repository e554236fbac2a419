"""What normal images look like to a model: the statistics behind scores and thresholds."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from simsid import metrics
from simsid.errors import InputError
from simsid.models.signals import SIGNALS


@dataclass(frozen=True)
class Calibration:
    """Mean and standard deviation of each signal over normal images, and the signals of held-out normal images.

    Source: SimSID, section 3.6, mu and sigma of the anomaly score. `holdout` keeps the signals of normal images that
    the model was not trained on: a threshold for a chosen false positive rate needs nothing else. `precision`: the
    arithmetic the signals were computed in; scores in another one must not be judged by them.
    """

    mean: dict[str, float]
    std: dict[str, float]
    count: int
    holdout: dict[str, list[float]] = field(default_factory=dict)
    precision: str = "float32"

    @classmethod
    def fit(
        cls,
        signals: dict[str, np.ndarray],
        holdout: dict[str, np.ndarray] | None = None,
        precision: str = "float32",
    ) -> "Calibration":
        """Measure the signals (`[n]` each, float64) of normal images, which were computed in `precision`.

        Raises:
            InputError: no image, or a signal that is not finite.
        """
        counts = {len(values) for values in signals.values()}
        if counts in (set(), {0}):
            raise InputError("calibration needs at least one normal image, got none")
        for name, values in [*signals.items(), *(holdout or {}).items()]:
            if not np.isfinite(values).all():
                raise InputError(f"calibration needs finite signals, got {name} = {values[~np.isfinite(values)][0]}")
        return cls(
            mean={name: float(np.mean(values)) for name, values in signals.items()},
            std={name: float(np.std(values)) for name, values in signals.items()},
            count=counts.pop(),
            holdout={name: [float(value) for value in values] for name, values in (holdout or {}).items()},
            precision=precision,
        )

    def standardize(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return `(values - mean) / std` of signal `name`; 0 is an average normal image."""
        return (values - self.mean[name]) / max(self.std[name], math.ulp(abs(self.mean[name]) or 1.0))

    def probability(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return `A = 1 - sigmoid((D - mu) / sigma)` in 0..1 (for the other signals: sigmoid of the standard score)."""
        return torch.sigmoid(torch.as_tensor(self.standardize(name, values), dtype=torch.float64)).numpy()

    def threshold(self, name: str, false_positive_rate: float = 0.05) -> float | None:
        """Return the raw value of signal `name` that at most `false_positive_rate` of normal images exceed.

        None where the calibration has no held-out normal images. See `simsid.metrics.normal_threshold`.

        Raises:
            InputError: a rate that does not lie strictly between 0 and 1.
        """
        metrics.check_rate("false_positive_rate", false_positive_rate)
        if name not in self.mean:
            raise InputError(f"signal must be one of the calibration's {', '.join(self.mean)}, got {name!r}")
        held = self.holdout.get(name)
        return metrics.normal_threshold(np.asarray(held), false_positive_rate) if held else None

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "mean": self.mean,
            "std": self.std,
            "count": self.count,
            "holdout": self.holdout,
            "precision": self.precision,
        }

    @classmethod
    def from_dict(cls, values: object) -> "Calibration":
        """Rebuild a calibration from `to_dict`.

        Raises:
            InputError: values that are not a calibration's, naming the field.
        """
        needed = {"mean", "std", "count", "holdout"}
        if not isinstance(values, dict) or values.keys() - {"precision"} != needed:
            raise InputError("calibration must hold mean, std, count and holdout")
        # Calibrations of older versions do not name it.
        precision = values.get("precision", "float32")
        if precision not in ("float32", "bfloat16"):
            raise InputError(f"calibration: precision must be float32 or bfloat16, got {precision!r}")
        mean, std, count, holdout = (values[name] for name in ("mean", "std", "count", "holdout"))
        for name, part in (("mean", mean), ("std", std), ("holdout", holdout)):
            if not isinstance(part, dict) or not part.keys() <= set(SIGNALS):
                raise InputError(f"calibration: {name} must be given by signal")
        if mean.keys() != std.keys():
            raise InputError("calibration: mean and std must be of the same signals")
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InputError("calibration: count must be a whole number of at least 1")
        if not all(isinstance(kept, list) for kept in holdout.values()):
            raise InputError("calibration: holdout must be a list of numbers by signal")
        for name, numbers in (
            ("mean", mean.values()),
            ("std", std.values()),
            ("holdout", [number for kept in holdout.values() for number in kept]),
        ):
            if not all(_is_finite(number) for number in numbers):
                raise InputError(f"calibration: {name} must hold finite numbers alone")
        if any(number < 0 for number in std.values()):
            raise InputError("calibration: std must not be negative")
        return cls(mean, std, count, holdout, precision)


def _is_finite(number: object) -> bool:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return False
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer that no float can hold
        return False

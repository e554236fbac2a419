"""What normal images look like to a model: the statistics behind scores and thresholds."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from simsid import metrics
from simsid.errors import InputError
from simsid.models.signals import SIGNALS

FEWEST_HELD = 30
"""Held-out normal images from which deviations at every location are taken."""

LocationUnits = dict[str, tuple[list[float], list[float]]]
"""Mean and deviation at each location, by signal."""


@dataclass(frozen=True)
class Calibration:
    """Mean and standard deviation of each signal over normal images, and the signals of held-out normal images.

    Source: SimSID, section 3.6, mu and sigma of the anomaly score. `holdout` keeps the signals of normal images that
    the model was not trained on: a threshold for a chosen false positive rate needs nothing else. `precision`: the
    arithmetic the signals were computed in; scores in another one must not be judged by them. `locations`: mean and
    deviation at each location of normal images, by signal that is standardized by them.
    """

    mean: dict[str, float]
    std: dict[str, float]
    count: int
    holdout: dict[str, list[float]] = field(default_factory=dict)
    precision: str = "float32"
    locations: LocationUnits = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        signals: dict[str, np.ndarray],
        holdout: dict[str, np.ndarray] | None = None,
        precision: str = "float32",
        locations: LocationUnits | None = None,
    ) -> "Calibration":
        """Measure the signals (`[n]` each, float64) of normal images, which were computed in `precision`.

        `locations` is what the signals were standardized by, of `standardize_locations`.

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
            locations=locations or {},
        )

    def standardize(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return `(values - mean) / std` of signal `name`; 0 is an average normal image.

        Raises:
            InputError: a signal that was not measured, as in a calibration of an older version.
        """
        self._check_measured(name)
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
        self._check_measured(name)
        held = self.holdout.get(name)
        return metrics.normal_threshold(np.asarray(held), false_positive_rate) if held else None

    def _check_measured(self, name: str) -> None:
        if name not in self.mean:
            raise InputError(f"signal must be one of the calibration's {', '.join(self.mean)}, got {name!r}")

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "mean": self.mean,
            "std": self.std,
            "count": self.count,
            "holdout": self.holdout,
            "precision": self.precision,
            **({"locations": {name: list(units) for name, units in self.locations.items()}} if self.locations else {}),
        }

    @classmethod
    def from_dict(cls, values: object) -> "Calibration":
        """Rebuild a calibration from `to_dict`.

        Raises:
            InputError: values that are not a calibration's, naming the field.
        """
        needed = {"mean", "std", "count", "holdout"}
        if not isinstance(values, dict) or values.keys() - {"precision", "locations"} != needed:
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
        return cls(mean, std, count, holdout, precision, _checked_locations(values.get("locations", {})))


def location_statistics(values: dict[str, np.ndarray]) -> LocationUnits:
    """Return mean and deviation at each location over images, of values by signal, `[n, L]` float64 each."""
    return {name: (found.mean(0).tolist(), _least(found, found.std(0)).tolist()) for name, found in values.items()}


def standardize_locations(
    held: dict[str, np.ndarray], fallback: Callable[[], LocationUnits]
) -> tuple[LocationUnits, dict[str, np.ndarray]]:
    """Return what locations are standardized by, and the standardized signals of the held-out images, `[n]` each.

    Both come from `held`, the values `[n, L]` by signal of images that the model was not trained on, where there are at
    least 30; fewer would look more normal by their own deviations than new images do, so `fallback` returns others, and
    no signals are returned.
    """
    if not held or min(map(len, held.values())) < FEWEST_HELD:
        return fallback(), {}
    return location_statistics(held), {name: judged_by_others(values) for name, values in held.items()}


def judged_by_others(values: np.ndarray) -> np.ndarray:
    """Return each image's mean squared deviation in the units of the other images: `[n, L]` to `[n]`, n at least 2.

    By units that it had a part in, an image would look more normal than a new one, and a threshold be too low.
    """
    n = len(values)
    offset = values - values.mean(0)
    variance = (values.var(0) - offset**2 / (n - 1)) * n / (n - 1)
    deviation = _least(values, np.sqrt(np.maximum(variance, 0)))
    return np.square(offset * n / (n - 1) / deviation).mean(1)


def _least(values: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Raise deviations that are rounding errors, or 0, to a millionth of the largest of the values."""
    return np.maximum(deviation, 1e-12 + 1e-6 * np.abs(values).max())


def _checked_locations(values: object) -> LocationUnits:
    checked: LocationUnits = {}
    entries: dict[object, object] = values if isinstance(values, dict) else {"locations": values}
    for name, units in entries.items():
        if not isinstance(units, list) or len(units) != 2 or not all(isinstance(part, list) for part in units):
            raise InputError("calibration: locations must hold means and deviations by standardized signal")
        if not isinstance(name, str) or name not in SIGNALS or SIGNALS[name].locations is None:
            raise InputError(f"calibration: locations must be of standardized signals, got {name!r}")
        mean, std = units
        if len(mean) != len(std) or not all(_is_finite(number) for number in (*mean, *std)) or min(std, default=0) <= 0:
            raise InputError(f"calibration: locations of {name} must be finite means, and deviations greater than 0")
        checked[name] = (mean, std)
    return checked


def _is_finite(number: object) -> bool:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return False
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer that no float can hold
        return False

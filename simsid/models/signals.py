"""Anomaly signals of a film, and their calibration on normal films."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SIGNALS = (
    "discriminator_per_image",
    "discriminator_running",
    "residual",
    "local_residual",
    "focal_residual",
    "memory_distance",
)
"""Every signal by name; a higher value is more anomalous. The discriminator's is its negated logit, once for each kind
of statistics it can normalise with."""

POOL = 8
"""Side of the squares whose mean error the local residual compares, pixels."""


def residual(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the mean squared reconstruction error of each image: `[B, 1, H, W]` twice to `[B]`, float64."""
    return (images.double() - reconstruction.double()).square().flatten(1).mean(1)


def local_residual(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the largest squared error after 8 x 8 average pooling: `[B, 1, H, W]` twice to `[B]`, float64."""
    error = (images.double() - reconstruction.double()).square()
    return F.avg_pool2d(error, POOL, ceil_mode=True, count_include_pad=False).flatten(1).amax(1)


def focal_residual(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the mean over the worst twentieth of 8 x 8 squares: `[B, 1, H, W]` twice to `[B]`, float64.

    Between `residual`, which a small anomaly hardly moves, and `local_residual`, which one chance square decides.
    """
    error = (images.double() - reconstruction.double()).square()
    squares = F.avg_pool2d(error, POOL, ceil_mode=True, count_include_pad=False).flatten(1)
    return squares.topk(-(-squares.shape[1] // 20), dim=1).values.mean(1)


def memory_distance(query: Tensor, retrieved: Tensor) -> Tensor:
    """Return the largest Euclidean distance of a location's query from its look-up: `[B, L, D]` to `[B]`, float64."""
    return (query.double() - retrieved.double()).norm(dim=-1).amax(1)


def heat_map(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the squared error averaged over the 9 x 9 pixels around each: `[B, 1, H, W]` twice to `[B, H, W]`."""
    error = (images.float() - reconstruction.float()).square()
    return F.avg_pool2d(error, 9, stride=1, padding=4, count_include_pad=False)[:, 0]


@dataclass(frozen=True)
class Calibration:
    """What normal films look like to a model: mean and standard deviation of each signal, and held-out values.

    Source: SimSID, section 3.6, mu and sigma of the anomaly score. `holdout` keeps the signals of normal films that the
    model was not trained on: a threshold for a chosen false-alarm rate needs nothing else.
    """

    mean: dict[str, float]
    std: dict[str, float]
    count: int
    holdout: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def fit(cls, signals: dict[str, np.ndarray], holdout: dict[str, np.ndarray] | None = None) -> "Calibration":
        """Measure the signals (`[n]` each, float64) of normal films."""
        counts = {len(values) for values in signals.values()}
        if counts in (set(), {0}):
            raise ValueError("calibration needs at least one normal image, got none")
        for name, values in [*signals.items(), *(holdout or {}).items()]:
            if not np.isfinite(values).all():
                raise ValueError(f"calibration needs finite signals, got {name} = {values[~np.isfinite(values)][0]}")
        return cls(
            mean={name: float(np.mean(values)) for name, values in signals.items()},
            std={name: float(np.std(values)) for name, values in signals.items()},
            count=counts.pop(),
            holdout={name: [float(value) for value in values] for name, values in (holdout or {}).items()},
        )

    def standardise(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return `(values - mean) / std` of signal `name`; 0 is an average normal film."""
        return (values - self.mean[name]) / max(self.std[name], math.ulp(abs(self.mean[name]) or 1.0))

    def probability(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return `A = 1 - sigmoid((D - mu) / sigma)` in 0..1 (for the other signals: sigmoid of the standard score)."""
        return torch.sigmoid(torch.as_tensor(self.standardise(name, values), dtype=torch.float64)).numpy()

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {"mean": self.mean, "std": self.std, "count": self.count, "holdout": self.holdout}

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> "Calibration":
        """Rebuild a calibration from `to_dict`; values that no calibration holds are a `ValueError`."""
        if not isinstance(values, dict) or values.keys() != {"mean", "std", "count", "holdout"}:
            raise ValueError("calibration must hold mean, std, count and holdout")
        mean, std, holdout = values["mean"], values["std"], values["holdout"]
        if not all(isinstance(part, dict) and part.keys() <= set(SIGNALS) for part in (mean, std, holdout)):
            raise ValueError("calibration must name mean, std and holdout by signal")
        numbers = [*mean.values(), *std.values(), *(n for kept in holdout.values() for n in kept)]
        if mean.keys() != std.keys() or not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
            raise ValueError("calibration must hold a finite mean and standard deviation of each signal")
        return cls(**values)

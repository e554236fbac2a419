"""A scikit-learn estimator around any anomaly model: for cross-validation, grid search and pipelines."""

import dataclasses
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from typing_extensions import Self

from simsid import checkpoint, metrics
from simsid.data import load_images
from simsid.data.preprocessing import to_float
from simsid.data.records import failure_summary
from simsid.errors import CheckpointError, ConfigError, InputError, InputTypeError, ReadError
from simsid.fields import replaced
from simsid.models import AnomalyModel, load
from simsid.models.presets import preset
from simsid.models.signals import check_signals

SAVED = ("model", "signal", "contamination", "false_positive_rate", "holdout", "input_range", "random_state", "device")


class Detector(OutlierMixin, BaseEstimator):
    """An outlier detector with scikit-learn's interface and signs: higher scores are more normal, -1 is an outlier.

    `X` is one of

    - an array `[n, 1, H, W]`, `[n, H, W]` or `[n, H * W]` of square images: floating point from -1 (black) to 1
      (white), or uint8 or uint16, where 0 becomes -1 and the largest value of the dtype 1; other ranges by
      `input_range`;
    - a list or array of paths, read as the model's preprocessing says.

    All of `X` is taken for normal, and `y` is ignored: leave known anomalies out, or set `contamination`.

    Args:
        model: the name of a preset or ablation (`"pixel_knn"`, `"simsid"`, ...), or a function that returns a new
            `AnomalyModel` and takes `parameters`.
        signal: the signal that scores; None is the model's own.
        contamination: the fraction of the training images that lie beyond the threshold, in (0, 0.5]; None:
            `false_positive_rate` decides.
        false_positive_rate: the fraction of new normal images that the threshold may flag, in (0, 1). The threshold
            comes from images that the model was not trained on: those of `holdout`, or the baselines' cross-fitting.
        holdout: the fraction of `X` that is not trained on but sets threshold and calibration, in [0, 1).
        input_range: the values (black, white) of numbers in `X`; `"fit"`: the least and greatest value of the training
            `X`, beyond which values are clipped; None: -1 and 1, or the ends of uint8 and uint16.
        random_state: seed of the initial weights and of the held-out images.
        device: where the model computes.
        fit_options: further arguments of the model's `fit`, such as `{"config": TrainingConfig(epochs=20)}`.
        **parameters: fields of the model's configuration, such as `neighbors=3`; with `get_params`, `set_params` and
            grid search like the others. Without `image_size` a model has that of the arrays it is fitted to; rows
            `[n, F]` whose F is not a square are then filled up with black, for data that are not images.

    Attributes:
        model_: the fitted `AnomalyModel`.
        offset_: `decision_function` is `score_samples` minus this; negative is an outlier.
        n_features_in_: pixels of an image.
        input_range_: the values that become black and white; None where the dtype says so.
    """

    model_: AnomalyModel
    offset_: float
    n_features_in_: int
    input_range_: tuple[float, float] | None

    def __init__(
        self,
        model: str | Callable[..., AnomalyModel] = "pixel_knn",
        *,
        signal: str | None = None,
        contamination: float | None = None,
        false_positive_rate: float = 0.05,
        holdout: float = 0.0,
        input_range: tuple[float, float] | str | None = None,
        random_state: int = 0,
        device: str = "cpu",
        fit_options: dict[str, Any] | None = None,
        **parameters: object,
    ) -> None:
        self.model = model
        self.signal = signal
        self.contamination = contamination
        self.false_positive_rate = false_positive_rate
        self.holdout = holdout
        self.input_range = input_range
        self.random_state = random_state
        self.device = device
        self.fit_options = fit_options
        for name, value in parameters.items():
            setattr(self, name, value)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return all parameters by name, those of the model's configuration that were set included."""
        return {**super().get_params(deep), **self._parameters()}

    def set_params(self, **params: Any) -> Self:
        """Set parameters, any field of the model's configuration included.

        Raises:
            InputError: a name that is neither a parameter nor a field of the model's configuration.
        """
        known = {*self.get_params(deep=False), *_fields(params.get("model", self.model))}
        unknown = [name for name in params if name not in known]
        # An unknown model is an error of `fit`, as scikit-learn wants it, and so are its parameters.
        if unknown and _fields(params.get("model", self.model)):
            raise InputError(f"{unknown[0]!r} is not a parameter; there are {', '.join(sorted(known))}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def fit(self, X: Any, y: object = None) -> Self:  # noqa: ARG002
        """Learn from normal images and set the threshold.

        Raises:
            InputError, InputTypeError: `X` or a parameter that cannot be used.
            ReadError: a file cannot be read; its score would be missing.
        """
        self._check_parameters()
        paths = _as_paths(X)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.random_state)
            if paths is None:
                images = self._images_of_numbers(X, reset=True)
                model = self._build(images.shape[-1])
            else:
                model = self._build()
                images = _read(paths, model)
                self.n_features_in_ = images[0].numel()
                self.input_range_ = None if self.input_range in (None, "fit") else _range(self.input_range)
            self._learn(model, images)
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """Return `[n]` float64, the negated signal of each image: higher is more normal."""
        check_is_fitted(self)
        paths = _as_paths(X)
        images = self._images_of_numbers(X, reset=False) if paths is None else _read(paths, self.model_)
        return self._scores(images)

    def decision_function(self, X: Any) -> np.ndarray:
        """Return `score_samples(X) - offset_`, `[n]` float64: negative is an outlier."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> np.ndarray:
        """Return `[n]` int64: -1 where the signal lies above the threshold, else 1."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the fitted detector to `folder`, atomically and without pickle: the model, and detector.json.

        The folder is also a model folder, which `simsid.load` and the command line take. `fit_options`, and a `model`
        that is a function, are not saved: such a detector scores after `load`, and cannot be fitted again.
        """
        check_is_fitted(self)
        names = [name for name in SAVED if name != "model" or isinstance(self.model, str)]
        parameters = {**{name: getattr(self, name) for name in names}, **self._parameters()}
        fitted = {"offset": self.offset_, "n_features_in": self.n_features_in_, "input_range": self.input_range_}
        self.model_.save(folder)
        checkpoint.write_json(pathlib.Path(folder) / "detector.json", {"parameters": parameters, "fitted": fitted})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: str | None = None) -> "Detector":
        """Read a detector that `save` wrote; nothing in the files is executed.

        Args:
            folder: the detector's folder.
            device: where it will compute; None is where it was fitted.

        Raises:
            CheckpointError: the folder holds no detector, or a damaged one.
        """
        path = pathlib.Path(folder) / "detector.json"
        document = checkpoint.read_json(path)
        try:
            parameters: Any = document["parameters"]
            fitted: Any = document["fitted"]
            detector = cls(**{**parameters, "model": parameters.get("model")})
            detector.device = device or detector.device
            detector._check_parameters()
            detector.offset_ = float(fitted["offset"])
            detector.n_features_in_ = int(fitted["n_features_in"])
            detector.input_range_ = None if fitted["input_range"] is None else _range(fitted["input_range"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is not a detector: {error}") from None
        if isinstance(detector.input_range, list):
            detector.input_range = tuple(detector.input_range)
        detector.model_ = load(folder, device=detector.device)
        return detector

    def _parameters(self) -> dict[str, object]:
        """Return the fields of the model's configuration that were set."""
        own = super().get_params(deep=False)
        # Names that begin with an underscore are scikit-learn's own, those that end with one were fitted.
        return {name: value for name, value in vars(self).items() if name not in own and name.strip("_") == name}

    def _check_parameters(self) -> None:
        if self.contamination is not None and not 0 < self.contamination <= 0.5:
            raise InputError(f"contamination must be None or in (0, 0.5], got {self.contamination!r}")
        metrics.check_rate("false_positive_rate", self.false_positive_rate)
        if not 0 <= self.holdout < 1:
            raise InputError(f"holdout must be at least 0 and below 1, got {self.holdout!r}")
        if self.input_range not in (None, "fit"):
            _range(self.input_range)

    def _build(self, image_size: int | None = None) -> AnomalyModel:
        """Return a new model; `image_size` is that of the arrays, used where no other is set."""
        parameters = self._parameters()
        if callable(self.model):
            return self.model(**parameters)
        if not isinstance(self.model, str):
            raise InputTypeError(f"model must be a preset's name or a function, got {self.model!r}")
        if image_size is not None:
            parameters = {"image_size": image_size, **parameters}
        chosen = preset(self.model)
        return chosen.model(replaced(chosen.config(), parameters)).to_device(self.device)

    def _learn(self, model: AnomalyModel, images: Tensor) -> None:
        """Fit the model on what is not held out, and set the threshold."""
        order = torch.randperm(len(images))
        count = math.floor(self.holdout * len(images))
        held, train = order[:count].sort().values, order[count:].sort().values
        model.fit(images[train], images[held] if count else None, **(self.fit_options or {}))
        (name,) = check_signals([self.signal or model.signal], model.signal_names)
        self.model_ = model
        if self.contamination is not None:
            self.offset_ = float(np.percentile(self._scores(images), 100 * self.contamination))
            return
        threshold = model.calibrated().threshold(name, self.false_positive_rate)
        if threshold is None:
            warnings.warn(
                "the threshold comes from the training images, and more than false_positive_rate of new normal images "
                "may lie above it; use holdout=0.1",
                stacklevel=3,
            )
            threshold = metrics.normal_threshold(-self._scores(images), self.false_positive_rate)
        self.offset_ = -threshold

    def _scores(self, images: Tensor) -> np.ndarray:
        name = self.signal or self.model_.signal
        return -self.model_.signals(images, [name])[name]

    def _images_of_numbers(self, X: Any, *, reset: bool) -> Tensor:
        """Return float32 `[n, 1, S, S]` in -1..1; `reset` takes number of pixels and range from `X`."""
        if getattr(X, "ndim", 2) in (3, 4):
            shape = list(X.shape)
            if shape[1:-2] not in ([], [1]) or shape[-1] != shape[-2]:
                raise InputError(f"X must have shape [n, 1, H, W] or [n, H, W] with H = W, got {shape}")
            X = np.asarray(X).reshape(shape[0], -1)
        rows = validate_data(self, X, reset=reset, dtype="numeric")
        if reset:
            self.input_range_ = _measured_range(rows, self.input_range)
        side = math.isqrt(rows.shape[1] - 1) + 1
        if side**2 != rows.shape[1] and "image_size" in self._parameters():
            raise InputError(f"X must have H * W values a row with H = W, got {rows.shape[1]}")
        images = np.full((len(rows), side**2), -1.0, np.float32)
        images[:, : rows.shape[1]] = self._normalized(rows)
        return torch.from_numpy(images).view(-1, 1, side, side)

    def _normalized(self, rows: np.ndarray) -> np.ndarray:
        """Map `[n, F]` to -1..1; floating-point values are checked by the model."""
        if self.input_range_ is None:
            if rows.dtype.kind == "f":
                return rows
            if rows.dtype not in (np.uint8, np.uint16):
                raise InputTypeError(f"X must be floating point, uint8 or uint16 without input_range, got {rows.dtype}")
            return to_float(torch.from_numpy(np.require(rows, requirements=["C", "W"]))).numpy()
        low, high = self.input_range_
        scaled = (rows.astype(np.float64) - low) * (2.0 / (high - low)) - 1.0
        return np.clip(scaled, -1.0, 1.0) if self.input_range == "fit" else scaled


def _fields(model: object) -> list[str]:
    """Return the fields of a preset's configuration; none where the model is a function or unknown."""
    try:
        return [entry.name for entry in dataclasses.fields(preset(model).config())] if isinstance(model, str) else []
    except ConfigError:
        return []


def _as_paths(X: Any) -> list[str] | None:
    """Return `X` as paths where it is a list or array of them, else None.

    Raises:
        InputTypeError: a single path, or paths among other things.
    """
    if isinstance(X, (str, bytes, os.PathLike)):
        raise InputTypeError(f"X must be an array of images or a list of paths, got the path {os.fspath(X)!r}")
    if not (isinstance(X, (list, tuple)) or (isinstance(X, np.ndarray) and X.ndim == 1)):
        return None
    paths = [isinstance(item, (str, os.PathLike)) for item in X]
    if not any(paths):
        return None
    if not all(paths):
        raise InputTypeError(f"X must hold paths only, got an item of type {type(X[paths.index(False)]).__name__}")
    return [os.fspath(item) for item in X]


def _read(paths: Sequence[str], model: AnomalyModel) -> Tensor:
    """Read files as the model takes them: float32 `[n, 1, H, W]`."""
    images = load_images(paths, **model.preprocessing.to_dict())
    if images.failures:
        raise ReadError(failure_summary(images.failures, len(paths)))
    return images.batch(slice(None))


def _range(values: Any) -> tuple[float, float]:
    """Return a range as two numbers."""
    try:
        low, high = (float(value) for value in values)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"input_range must be None, 'fit' or two numbers (black, white), got {values!r}")
    return low, high


def _measured_range(rows: np.ndarray, input_range: Any) -> tuple[float, float] | None:
    """Return the values that become black and white; None for those that the dtype suggests."""
    if input_range == "fit":
        low, high = float(rows.min()), float(rows.max())
        return (low, high) if low < high else (low, low + 1.0)
    return None if input_range is None else _range(input_range)

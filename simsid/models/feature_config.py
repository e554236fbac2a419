"""The choices that make a feature memory."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from simsid import fields
from simsid.data import Preprocessing
from simsid.errors import ConfigError
from simsid.fields import require
from simsid.models.feature_encoder import INPUTS
from simsid.models.feature_pooled import WEIGHTS

SIGNAL_NAMES = ("pooled_memory", "inpainting", "synthetic", "combined")
RANGES = {
    "image_size": (32, 4096),
    "pooled_layers": (1, 64),
    "neighbors": (1, 1000),
    "grid": (2, 32),
    "components": (1, 1024),
    "items": (1, 10_000),
    "topk": (1, 64),
    "most_images": (8, 1_000_000),
    "seed": (0, 2**31),
    "penalty": (0.0, 1e9),
    "inpainting_weight": (0.0, 1e9),
    "synthetic_weight": (0.0, 1e9),
}
"""Least and greatest value of each number; a damaged file must not make a model's size absurd."""


@dataclass(frozen=True)
class FeatureConfig:
    """Everything that determines a feature memory besides its encoder and the images.

    Raises:
        ConfigError: a value outside its range; the message names the field.
    """

    image_size: int = 224
    """Height and width of the square image that the encoder sees, pixels."""
    aspect: str = "stretch"
    """How a file that is not square becomes square, see `simsid.data.Preprocessing`."""
    intensity: str = "auto"
    """Which values become black and white, see `simsid.data.Preprocessing`."""
    layers: tuple[str, ...] = ()
    """Submodules of the encoder whose outputs are the feature maps; empty: what the encoder returns."""
    inputs: str = "imagenet"
    """What the encoder takes: three equal channels normalized for ImageNet, or `"gray"`, one channel in -1..1."""
    weight: str | tuple[tuple[float, ...], ...] = "lungs"
    """How much each location counts: `"lungs"` (two ellipses of a frontal chest radiograph), `"uniform"` for other
    anatomies, or an array `[h, w]` of numbers of at least 0 that covers the image."""
    pooled_layers: int = 2
    """Deepest layers whose mean features the pooled memory compares. Shallower ones see sharpness and compression,
    which differ between sites."""
    neighbors: int = 5
    """Nearest images whose mean distance is the pooled score; 1 to 25 made no difference."""
    grid: int = 7
    """Rows and columns of the in-painting's locations."""
    components: int = 64
    """Principal components that the in-painting keeps; at most the encoder's channels are used."""
    items: int = 100
    """Items a location has in the in-painting's memory, N; 15 to 100 made no difference."""
    topk: int = 5
    """Items of a look-up, k."""
    penalty: float = 1.0
    """Ridge penalty of the prediction from the neighbors, for each training image."""
    inpainting_weight: float = 0.3
    """Weight of the in-painting in the combined signal, where the pooled memory has 1."""
    synthetic: bool = False
    """Also train a linear classifier against painted opacities; fitting takes half as long again."""
    synthetic_weight: float = 0.25
    """Weight of that classifier in the combined signal."""
    signal: str = "combined"
    """The signal that `score` and thresholds use."""
    most_images: int = 4000
    """Images that are fitted at most, a uniform sample of what `fit` receives; they take 75 kB of memory each."""
    seed: int = 0
    """Of the sample, the jittered copies, the painted opacities and the k-means centers."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _names(self.layers))
        object.__setattr__(self, "weight", _weight(self.weight))
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.type in (int, float):
                number = isinstance(value, int) or (entry.type is float and isinstance(value, float))
                kind = "a number" if entry.type is float else "a whole number"
                require(number and not isinstance(value, bool), entry.name, kind, value)
                low, high = RANGES[entry.name]
                require(low <= value <= high and math.isfinite(value), entry.name, f"in {low} to {high}", value)
            elif entry.type is bool:
                require(isinstance(value, bool), entry.name, "true or false", value)
        require(self.penalty > 0, "penalty", "greater than 0", self.penalty)
        require(self.inputs in INPUTS, "inputs", f"one of {', '.join(map(repr, INPUTS))}", self.inputs)
        require(self.signal in self.signal_names, "signal", f"one of {', '.join(self.signal_names)}", self.signal)
        Preprocessing(self.image_size, self.aspect, self.intensity)

    @property
    def signal_names(self) -> tuple[str, ...]:
        """The signals of this configuration."""
        return tuple(name for name in SIGNAL_NAMES if self.synthetic or name != "synthetic")

    def replace(self, **changes: Any) -> "FeatureConfig":
        """Return a copy with other fields.

        Raises:
            ConfigError: a field that does not exist, or a value outside its range.
        """
        return fields.replaced(self, changes)

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: object) -> "FeatureConfig":
        """Rebuild a configuration from `to_dict`; absent fields keep their defaults."""
        return fields.from_dict(cls, values)


def _names(layers: object) -> tuple[str, ...]:
    fits = isinstance(layers, (tuple, list)) and all(isinstance(name, str) for name in layers)
    require(fits, "layers", "a tuple of module names", layers)
    return tuple(layers)  # type: ignore[arg-type]


def _weight(weight: object) -> str | tuple[tuple[float, ...], ...]:
    """Return a weight's name or its rows as plain numbers, which compare and go into JSON."""
    if isinstance(weight, str):
        require(weight in WEIGHTS, "weight", f"one of {', '.join(map(repr, WEIGHTS))} or an array [h, w]", weight)
        return weight
    try:
        array = np.asarray(weight, np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"weight must be a name or an array [h, w] of numbers, got {weight!r}") from None
    fits = array.ndim == 2 and 0 < array.size <= 1 << 20 and bool(np.isfinite(array).all())
    fits = fits and bool((array >= 0).all()) and bool(array.sum() > 0)
    require(fits, "weight", "an array [h, w] of numbers of at least 0, not all 0", f"shape {array.shape}")
    return tuple(tuple(row) for row in array.tolist())

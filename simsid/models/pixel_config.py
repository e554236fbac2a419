"""The choices that make the baselines on pixels."""

from dataclasses import dataclass
from typing import Literal

from simsid.fields import check_fields


@dataclass(frozen=True)
class PixelConfig:
    """How images are prepared for a baseline on pixels."""

    image_size: int = 128
    """Height and width of the square image, pixels."""
    aspect: Literal["stretch", "pad", "crop"] = "stretch"
    """How an image that is not square becomes square."""
    intensity: Literal["auto", "range", "minmax"] = "auto"
    """How stored pixel values become -1..1; see `simsid.data.Preprocessing`."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be used, naming the field."""
        counts = ("image_size", "neighbors", "components", "trees", "sample")
        least = {name: 2 if name == "sample" else 1 for name in counts} | {"seed": 0}
        check_fields(self, {name: low for name, low in least.items() if hasattr(self, name)})


@dataclass(frozen=True)
class PixelKNNConfig(PixelConfig):
    """The choices of `simsid.models.PixelKNN`."""

    neighbors: int = 5
    """Nearest training images whose distance is averaged, k; with fewer images, all of them."""


@dataclass(frozen=True)
class PixelPCAConfig(PixelConfig):
    """The choices of `simsid.models.PixelPCA`."""

    components: int = 64
    """Principal components; at most one fewer than training images are used."""


@dataclass(frozen=True)
class PixelIsolationForestConfig(PixelConfig):
    """The choices of `simsid.models.PixelIsolationForest`."""

    trees: int = 100
    """Trees of the forest."""
    sample: int = 256
    """Training images that a tree is grown on, drawn without replacement; with fewer images, all of them."""
    seed: int = 0
    """Seed of the samples and of the splits."""

"""Published configurations and baselines by name, each with the class of models that it configures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from simsid import config as configs
from simsid.config import ABLATIONS, Config
from simsid.errors import ConfigError
from simsid.models.base import AnomalyModel
from simsid.models.baselines import PixelIsolationForest, PixelKNN, PixelPCA
from simsid.models.feature_baselines import FeatureKNN, LocationKNN, PaDiM, PatchCore
from simsid.models.feature_config import FeatureConfig
from simsid.models.feature_memory import FeatureMemory
from simsid.models.model import Model
from simsid.models.pixel_config import PixelIsolationForestConfig, PixelKNNConfig, PixelPCAConfig


@dataclass(frozen=True)
class Preset:
    """A class of models, and what returns the configuration to start from."""

    model: Callable[[Any], AnomalyModel]
    config: Callable[[], Any]


PRESETS: dict[str, Preset] = {
    **{name: Preset(Model, config) for name, config in configs.PRESETS.items()},
    "features": Preset(FeatureMemory, FeatureConfig),
    "feature_knn": Preset(FeatureKNN, FeatureConfig),
    "location_knn": Preset(LocationKNN, FeatureConfig),
    "padim": Preset(PaDiM, FeatureConfig),
    "patchcore": Preset(PatchCore, FeatureConfig),
    "pixel_knn": Preset(PixelKNN, PixelKNNConfig),
    "pixel_pca": Preset(PixelPCA, PixelPCAConfig),
    "pixel_isolation_forest": Preset(PixelIsolationForest, PixelIsolationForestConfig),
}


def preset(name: str) -> Preset:
    """Return the preset or ablation of a name.

    Raises:
        ConfigError: an unknown name, with the known ones.
    """
    if name in ABLATIONS:
        return Preset(Model, lambda: Config.ablation(name))
    if name not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join((*PRESETS, *ABLATIONS))}, got {name!r}")
    return PRESETS[name]


def seeded_model(name: str, config: Any, seed: int, device: torch.device | str) -> AnomalyModel:
    """Return a new model of preset `name` with this configuration, whose initial weights come from `seed`."""
    torch.manual_seed(seed)
    return preset(name).model(config).to_device(device)

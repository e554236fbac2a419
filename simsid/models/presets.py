"""Published configurations and baselines by name, each with the class of models that it configures."""

from collections.abc import Callable
from typing import Any

import torch

from simsid import config as configs
from simsid.config import ABLATIONS, Config
from simsid.errors import ConfigError
from simsid.models.base import AnomalyModel
from simsid.models.baselines import PixelKNN, PixelPCA
from simsid.models.feature_config import FeatureConfig
from simsid.models.feature_memory import FeatureMemory
from simsid.models.model import Model

PRESETS: dict[str, Callable[[], Any]] = {
    **configs.PRESETS,
    "features": FeatureConfig,
    "pixel_knn": configs.PixelKNNConfig,
    "pixel_pca": configs.PixelPCAConfig,
}
"""Configuration of each preset; `build` makes the model."""

_BUILDERS: dict[type, Callable[[Any], AnomalyModel]] = {
    Config: Model,
    FeatureConfig: FeatureMemory,
    configs.PixelKNNConfig: PixelKNN,
    configs.PixelPCAConfig: PixelPCA,
}


def preset(name: str) -> Any:
    """Return the configuration of a preset or ablation.

    Raises:
        ConfigError: an unknown name, with the known ones.
    """
    if name in ABLATIONS:
        return Config.ablation(name)
    if name not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join((*PRESETS, *ABLATIONS))}, got {name!r}")
    return PRESETS[name]()


def build(config: Any) -> AnomalyModel:
    """Return a new model of any configuration."""
    return _BUILDERS[type(config)](config)


def seeded_model(config: Any, seed: int, device: torch.device | str) -> AnomalyModel:
    """Return a new model whose initial weights come from `seed`."""
    torch.manual_seed(seed)
    return build(config).to_device(device)

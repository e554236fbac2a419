"""Anomaly models: the networks of SimSID and SQUID, their signals and calibration, and plain baselines."""

from simsid.models.base import AnomalyModel
from simsid.models.baselines import PixelIsolationForest, PixelKNN, PixelPCA
from simsid.models.calibration import Calibration
from simsid.models.feature_baselines import FeatureKNN, LocationKNN, PaDiM, PatchCore
from simsid.models.feature_config import FeatureConfig
from simsid.models.feature_memory import Adaptation, FeatureMemory
from simsid.models.inference import FrozenModel, freeze
from simsid.models.loading import load, shipped_models
from simsid.models.memory_contents import MemoryContents
from simsid.models.model import Model, Reconstruction
from simsid.models.signals import MAPS, SIGNALS, Map, Signal

__all__ = [
    "MAPS",
    "SIGNALS",
    "Adaptation",
    "AnomalyModel",
    "Calibration",
    "FeatureConfig",
    "FeatureKNN",
    "FeatureMemory",
    "FrozenModel",
    "LocationKNN",
    "Map",
    "MemoryContents",
    "Model",
    "PaDiM",
    "PatchCore",
    "PixelIsolationForest",
    "PixelKNN",
    "PixelPCA",
    "Reconstruction",
    "Signal",
    "freeze",
    "load",
    "shipped_models",
]

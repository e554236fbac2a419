"""Opens any saved model by the kind that its model.json names."""

import os
import pathlib

import torch

from simsid import checkpoint
from simsid.arguments import require_path
from simsid.errors import CheckpointError
from simsid.models.base import AnomalyModel
from simsid.models.baselines import PixelKNN, PixelPCA
from simsid.models.feature_memory import FeatureMemory
from simsid.models.model import Model

KINDS: dict[str, type[AnomalyModel]] = {kind.kind: kind for kind in (Model, FeatureMemory, PixelKNN, PixelPCA)}
"""Every class of models that can be saved, by its kind."""


def load(folder: str | os.PathLike, *, device: torch.device | str = "cpu", **options: object) -> AnomalyModel:
    """Read a saved model or a training run's best model; nothing in the files is executed.

    Args:
        folder: the model's folder.
        device: where it will compute.
        **options: keyword arguments of the model's class that are not saved, such as `backend` of `Model`.

    Raises:
        CheckpointError: the folder holds no model, a damaged one, or one of an unknown kind.
    """
    path = pathlib.Path(require_path("folder", folder))
    kind = checkpoint.read_json(path / "model.json").get("kind")
    found = KINDS.get(kind) if isinstance(kind, str) else None
    if found is None:
        raise CheckpointError(f"{path / 'model.json'}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return found.load(path, device=device, **options)

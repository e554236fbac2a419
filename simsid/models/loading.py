"""Opens any saved model by the kind that its model.json names."""

import os
import pathlib

import torch

from simsid import checkpoint
from simsid.arguments import require_path
from simsid.errors import CheckpointError
from simsid.models.base import AnomalyModel
from simsid.models.baselines import PixelIsolationForest, PixelKNN, PixelPCA
from simsid.models.feature_baselines import FeatureKNN, LocationKNN, PaDiM, PatchCore
from simsid.models.feature_memory import FeatureMemory
from simsid.models.model import Model

KINDS: dict[str, type[AnomalyModel]] = {
    kind.kind: kind
    for kind in (
        *(Model, FeatureMemory),
        *(PixelKNN, PixelPCA, PixelIsolationForest),
        *(FeatureKNN, LocationKNN, PaDiM, PatchCore),
    )
}
"""Every class of models that can be saved, by its kind."""


SHIPPED = pathlib.Path(__file__).with_name("shipped")
"""Folder of the fitted models that come with simsid, each under its name."""


def shipped_models() -> tuple[str, ...]:
    """Return the names of the fitted models that come with simsid."""
    return tuple(sorted(file.parent.name for file in SHIPPED.glob("*/model.json")))


def load(
    folder: str | os.PathLike, *, device: torch.device | str = "cpu", precision: str = "auto", **options: object
) -> AnomalyModel:
    """Read a saved model, a training run's best model or one that comes with simsid; nothing in it is executed.

    Args:
        folder: the model's folder, or the name of a shipped model, as in `load("zhanglab")`. A folder of that name is
            meant by a path (`"./zhanglab"`, or a `pathlib.Path`).
        device: where it will compute.
        precision: `"float32"`, `"bfloat16"`, or `"auto"`, that of the model's calibration.
        **options: keyword arguments of the model's class that are not saved, such as `backend` of `Model`.

    Raises:
        CheckpointError: the folder holds no model, a damaged one, or one of an unknown kind.
    """
    path = pathlib.Path(require_path("folder", folder))
    if isinstance(folder, str) and folder in shipped_models():
        path = SHIPPED / folder
    elif isinstance(folder, str) and path.name == folder and not path.exists():
        names = ", ".join(shipped_models())
        raise CheckpointError(f"{path / 'model.json'} does not exist, and the shipped models are {names}")
    kind = checkpoint.read_json(path / "model.json").get("kind")
    found = KINDS.get(kind) if isinstance(kind, str) else None
    if found is None:
        raise CheckpointError(f"{path / 'model.json'}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return found.load(path, device=device, precision=precision, **options)

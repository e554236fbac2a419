"""The training state in a run folder: progress, weights, optimizer state, and the request that it belongs to."""

import dataclasses
import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from simsid import checkpoint
from simsid.config import Config, TrainingConfig
from simsid.data import ImageSet
from simsid.distributed import ProcessGroup
from simsid.errors import CheckpointError, RunError
from simsid.models.model import Model
from simsid.training.guard import check_finite
from simsid.training.run_folder import RunFolder
from simsid.training.step import TrainingStep

Request = dict[str, object]
"""What identifies a run: model configuration, training configuration, hash of the images."""

DIFFERENCES = {
    "config": "another model configuration",
    "training": "another training configuration",
    "data": "other images",
}
"""How an error message calls a difference between two requests, by its key."""

SavedState = tuple[dict[str, Tensor], dict[str, Any]]
"""The tensors of a training state and its JSON document."""


@dataclass
class History:
    """The course of a training: one dictionary per epoch (losses, validation), and the epoch that was kept."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None
    """The epoch whose weights the model has, counted from 0."""
    best_value: float | None = None
    """Its value of the criterion, higher is better: the AUC, or the negated error or distance."""
    interrupted: bool = False
    """Whether Ctrl-C stopped the training early."""


@dataclass
class Progress:
    """How far a training has come. With weights and optimizer state, this is all that a resumed run needs."""

    epoch: int = 0
    position: int = 0
    """Iterations done in this epoch."""
    step: int = 0
    """Iterations done in all epochs."""
    sums: dict[str, float] = field(default_factory=dict)
    """Sum of each loss over this epoch's iterations; up to date only in a saved state (the step has them before)."""
    counts: dict[str, int] = field(default_factory=dict)
    """Iterations in each of these sums."""
    history: History = field(default_factory=History)
    finished: bool = False


def make_request(model: Model, config: TrainingConfig, train: ImageSet, val: ImageSet | None) -> Request:
    """Return what identifies a training, with a SHA-256 hash of all pixels and labels."""
    digest = hashlib.sha256()
    for images in (train, val):
        if images is not None:
            digest.update(images.pixels.cpu().contiguous().numpy().data)
            digest.update(images.labels.tobytes())
    return {"config": model.config.to_dict(), "training": config.to_dict(), "data": digest.hexdigest()}


def check_agreement(group: ProcessGroup, request: Request) -> None:
    """Refuse to train where the ranks have different requests.

    Raises:
        RunError: naming the first rank that differs from rank 0, and in what.
    """
    requests = group.all_gather_object(request)
    for rank, other in enumerate(requests):
        for name in request:
            if other[name] != requests[0][name]:
                raise RunError(f"the processes must train on the same; rank {rank} has {DIFFERENCES[name]} than rank 0")


def save(folder: RunFolder, step: TrainingStep, progress: Progress, request: Request) -> None:
    """Write the training state atomically.

    Raises:
        NonFiniteError: a loss, a gradient, a weight or a running statistic is not finite; the older state is kept.
    """
    progress.sums, progress.counts = step.sums(), dict(step.counts)
    own = checkpoint.tensors(step.model)
    check_finite(own, "the model's")
    tensors = {f"model.{name}": value for name, value in own.items()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in step.model.named_parameters()}
    for side, optimizer in step.optimizers.items():
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                tensors[f"optimizer.{side}.{key}.{names[parameter]}"] = value
    folder.write_state(tensors, {"progress": dataclasses.asdict(progress), **request})


def read(folder: RunFolder, request: Request) -> SavedState | None:
    """Read the state of a run folder; None where it has none.

    Raises:
        RunError: the state is of a run with another request.
        CheckpointError: the state is damaged.
    """
    if not folder.started:
        return None
    tensors, document = checkpoint.read(folder.path, "last")
    # An older version had fewer settings; those it did not have were at their defaults.
    for name, defaults in (("config", Config().to_dict()), ("training", TrainingConfig().to_dict())):
        settings = document.get(name)
        document[name] = {**defaults, **settings} if isinstance(settings, dict) else settings
    for name, value in request.items():
        if document.get(name) != value:
            raise RunError(
                f"{folder.path} was started with {DIFFERENCES[name]}; resume it with the same, or start a new run in "
                f"another folder"
            )
    return tensors, document


def restore(state: SavedState, step: TrainingStep, source: str) -> Progress:
    """Load a saved state into the model and the optimizers of `step`, and return the progress.

    Args:
        state: what `read` returned.
        step: a step that has not run yet.
        source: the file, for error messages.

    Raises:
        CheckpointError: the state does not fit the model.
    """
    tensors, document = state
    own = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    checkpoint.load_state(step.model, own, source)
    names: dict[Tensor, str] = {parameter: name for name, parameter in step.model.named_parameters()}
    for side, optimizer in step.optimizers.items():
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            keys = {key: f"optimizer.{side}.{key}.{names[parameter]}" for key in ("step", "exp_avg", "exp_avg_sq")}
            # A parameter that no iteration has updated yet has no state.
            if all(name in tensors for name in keys.values()):
                optimizer.state[parameter] = {
                    key: _like(parameter, tensors[name], keep_shape=key == "step") for key, name in keys.items()
                }
    try:
        values = dict(document["progress"])
        values["history"] = History(**values["history"])
        return Progress(**values)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{source} is not a training state: {error}") from None


def _like(parameter: Tensor, value: Tensor, keep_shape: bool) -> Tensor:
    """Copy to the parameter's device and memory layout; in another layout Adam would round differently."""
    return value.to(parameter.device) if keep_shape else torch.empty_like(parameter).copy_(value)

"""One cell of a study with one seed: trained or fitted in its run folder, evaluated, and read again when finished."""

import dataclasses
import json
import pathlib
import statistics
import time
from dataclasses import dataclass
from typing import Any

from simsid import checkpoint
from simsid.config import TrainingConfig
from simsid.errors import CheckpointError
from simsid.evaluation import evaluate
from simsid.models.base import AnomalyModel
from simsid.models.loading import load
from simsid.models.presets import seeded_model
from simsid.models.scorer import BATCH
from simsid.study.differences import refuse_difference
from simsid.study.images import StudyImages
from simsid.study.plan import Plan, configuration, is_network
from simsid.study.studies import Cell
from simsid.training import Trainer
from simsid.training.run_folder import RunFolder, fit_in_folder, open_run

RESULT = "result.json"
TIMED_BATCHES = 4
"""Batches whose scoring is timed."""


@dataclass(frozen=True)
class Result:
    """What was measured of a cell with one seed."""

    signal: str
    """The model's own signal."""
    auc: dict[str, float]
    """Area under the ROC curve of every signal."""
    low: dict[str, float]
    """Lower end of its 95 % interval (DeLong)."""
    high: dict[str, float]
    """Upper end."""
    best_accuracy: float
    """Of the model's own signal at the threshold of highest accuracy on the evaluated images, as in the papers."""
    best_f1: float
    """F1 at that threshold."""
    epoch_seconds: float | None
    """Median time of an epoch with its validation; None where nothing is trained."""
    image_seconds: float
    """Time of scoring one image of a batch by the model's own signal, the median of some batches."""
    seconds: float
    """Time of this cell as it was last started, with the evaluation; a resumed cell counts from its resumption."""


def run_cell(
    cell: Cell, seed: int, plan: Plan, images: StudyImages, folder: pathlib.Path, *, criterion: str, device: str
) -> Result | None:
    """Return the result of a cell; train and evaluate where the folder does not have it yet, resuming a stopped run.

    Returns:
        The result, or None where Ctrl-C stopped the training, whose state is written.

    Raises:
        RunError: the folder holds a run with other settings or images.
    """
    finished = finished_result(cell, seed, plan, images, folder, criterion=criterion)
    if finished is not None:
        return finished
    config, training = _settings(cell, seed, plan, images, criterion)
    request = _request(cell, seed, config, training, images)
    path = cell_folder(folder, cell, seed)
    resume = (path / "run.json").exists()
    began = time.monotonic()
    model: Any = seeded_model(cell.preset, config, seed, device)
    train = images.train(model.preprocessing, cell.normal_share, seed)
    val = images.val(model.preprocessing, labeled=criterion == "auc")
    epoch_seconds: float | None = None
    with open_run(path, None if resume else request) as run:
        if training is not None:
            epoch_seconds = _train(model, training, run, (train, val), resume)
            if epoch_seconds is None:
                return None
        elif (path / "model.json").exists():
            model = load(path, device=device)
        else:
            fit_in_folder(model, run, train, val)
        result = _measure(model, images, epoch_seconds, began)
        with run.writing(RESULT):
            checkpoint.write_json(path / RESULT, dataclasses.asdict(result))
    return result


def finished_result(
    cell: Cell, seed: int, plan: Plan, images: StudyImages, folder: pathlib.Path, *, criterion: str
) -> Result | None:
    """Return the result that a cell's folder holds, or None where it is not finished.

    Raises:
        RunError: the folder holds a run with other settings or images, finished or not.
        CheckpointError: the result is damaged.
    """
    path = cell_folder(folder, cell, seed)
    if not (path / "run.json").exists():
        return None
    config, training = _settings(cell, seed, plan, images, criterion)
    found = checkpoint.read_json(path / "run.json")
    # An older version had fewer settings; those it did not have were at their defaults.
    for name, defaults in (("model", type(config)()), ("training", TrainingConfig())):
        if isinstance(found.get(name), dict):
            found[name] = {**_as_json(dataclasses.asdict(defaults)), **found[name]}  # type: ignore[dict-item]
    refuse_difference(f"{path} holds a run", found, _request(cell, seed, config, training, images))
    return read_result(path / RESULT) if (path / RESULT).exists() else None


def cell_folder(folder: pathlib.Path, cell: Cell, seed: int) -> pathlib.Path:
    """Return the run folder of a cell with a seed, below the study's."""
    return folder / cell.folder / f"seed-{seed}"


def read_result(path: pathlib.Path) -> Result:
    """Read a finished cell.

    Raises:
        CheckpointError: the file is not a result.
    """
    remedy = "delete it, and the same command measures the model again"
    try:
        document: dict[str, Any] = checkpoint.read_json(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {remedy}") from None
    names = [field.name for field in dataclasses.fields(Result)]
    if document.keys() != set(names):
        raise CheckpointError(f"{path} must hold {', '.join(names)}, got {', '.join(document) or 'nothing'}; {remedy}")
    signal = document.pop("signal")
    if not isinstance(signal, str):
        raise CheckpointError(f"{path}: signal must be a name, got {signal!r}; {remedy}")
    for name, value in document.items():
        if name in ("auc", "low", "high"):
            if not isinstance(value, dict) or signal not in value or not all(map(_is_number, value.values())):
                raise CheckpointError(f"{path}: {name} must hold a number for each signal, got {value!r}; {remedy}")
        elif not _is_number(value) and not (name == "epoch_seconds" and value is None):
            raise CheckpointError(f"{path}: {name} must be a number, got {value!r}; {remedy}")
    return Result(signal=signal, **document)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _settings(
    cell: Cell, seed: int, plan: Plan, images: StudyImages, criterion: str
) -> tuple[Any, TrainingConfig | None]:
    """Return the configurations of a cell's model and of its training, None where nothing is trained."""
    network = is_network(cell)
    config = configuration(cell, images.digits, plan.width if network else None, seed)
    return config, plan.training(cell, seed, criterion, images.digits) if network else None


def _request(
    cell: Cell, seed: int, config: Any, training: TrainingConfig | None, images: StudyImages
) -> dict[str, object]:
    """Return what run.json keeps of a cell, as it is read again."""
    return _as_json(
        {
            "command": "study",
            "preset": cell.preset,
            "model": dataclasses.asdict(config),
            "training": training.to_dict() if training else None,
            "data": images.name,
            "train": images.train_count,
            "normal_share": cell.normal_share,
            "seed": seed,
        }
    )


def _as_json(document: dict[str, object]) -> dict[str, object]:
    """Return a document as JSON keeps it, where a tuple is a list."""
    return json.loads(json.dumps(document))


def _train(model: Any, training: Any, run: RunFolder, parts: tuple[Any, Any], resume: bool) -> float | None:
    """Train and return the median time of an epoch, or None where Ctrl-C stopped it."""
    if not (run.path / "manifest.csv").exists():
        run.write_manifest(*parts)
    history = Trainer(model, training, run=run).fit(*parts, resume=resume)
    if history.interrupted:
        return None
    return statistics.median(epoch["seconds"] for epoch in history.epochs)


def _measure(model: AnomalyModel, images: StudyImages, epoch_seconds: float | None, began: float) -> Result:
    evaluated = images.evaluated(model.preprocessing)
    totals = {row.signal: row for row in evaluate(model, evaluated).rows() if row.finding is None}
    own = totals[model.signal]
    batch, passes = evaluated.select(slice(0, BATCH)), []
    for _ in range(TIMED_BATCHES):
        before = time.perf_counter()
        model.signals(batch, [model.signal])
        passes.append(time.perf_counter() - before)
    return Result(
        signal=model.signal,
        auc={name: row.auc for name, row in totals.items()},
        low={name: row.low for name, row in totals.items()},
        high={name: row.high for name, row in totals.items()},
        best_accuracy=own.best_accuracy,
        best_f1=own.best_f1,
        epoch_seconds=epoch_seconds,
        image_seconds=statistics.median(passes) / len(batch),
        seconds=time.monotonic() - began,
    )

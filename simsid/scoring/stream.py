"""Scoring streams of files in bounded memory, one result for every file in their order."""

import dataclasses
import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from simsid.arguments import require_instance, require_whole_number
from simsid.data import Failure, Record, stream_images
from simsid.errors import InputTypeError
from simsid.kernels.ranges import stage
from simsid.models.base import AnomalyModel
from simsid.models.scorer import BATCH, Scorer
from simsid.models.signals import check_signals


@dataclass(frozen=True)
class Score:
    """The result of one file.

    Args:
        path: the file.
        label: 0 normal, 1 abnormal, None unknown; from the list of files, where there is one.
        finding: the kind of finding, from the list of files, or "".
        score: 0..1, 1 is anomalous.
        flagged: whether the signal lies above the threshold; None without a threshold.
        signals: the raw values by name.
        reason: why the file has no score; "" where it has one.
        for_processing: whether a DICOM file is stored FOR PROCESSING, so that its gray values are not for display.
        image: `[H, W]` float32 in -1..1 as the model saw it, for pictures. It is part of a batch: copy what is kept.
        provenance: how the file was decoded, see `simsid.data.Record`; of images just scored.
    """

    path: str
    label: int | None = None
    finding: str = ""
    score: float | None = None
    flagged: bool | None = None
    signals: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    for_processing: bool = False
    image: np.ndarray | None = field(default=None, repr=False, compare=False)
    provenance: Mapping[str, str | int | float] = field(default_factory=dict, repr=False, compare=False)


def columns(signal_names: Iterable[str]) -> list[str]:
    """Return the columns of `scores.csv`, the same for every command that writes one."""
    return ["path", "label", "finding", "score", "flagged", *signal_names, "reason"]


def row(score: Score, signal_names: Iterable[str]) -> list[object]:
    """Return a row of `scores.csv`; values that a file lacks are empty cells."""
    cells = [score.label, score.finding, score.score, None if score.flagged is None else int(score.flagged)]
    values = [score.signals.get(name) for name in signal_names]
    return [score.path, *("" if cell is None else cell for cell in (*cells, *values)), score.reason]


def score_files(
    model: AnomalyModel,
    files: Iterable[Record | str | os.PathLike],
    *,
    signal: str | None = None,
    false_positive_rate: float = 0.05,
    batch_size: int = BATCH,
    workers: int | None = None,
) -> Iterator[Score]:
    """Score files in bounded memory: one `Score` for every file, in their order, unreadable ones included.

    A file's score depends on nothing but the file: every batch has the same size. A file whose signals are not finite
    is a failed one, with the reason.

    Args:
        model: any calibrated model.
        files: records or paths.
        signal: the signal that scores and flags; None is the model's own.
        false_positive_rate: share of held-out normal images that the threshold may flag.
        batch_size: images of a forward pass.
        workers: threads that decode; None is one per core.

    Raises:
        CalibrationError: the model has not been calibrated.
        InputError: at the call, an option out of range; never for a file.
    """
    require_instance("model", model, AnomalyModel)
    if isinstance(files, (str, os.PathLike)) or not isinstance(files, Iterable):
        raise InputTypeError(f"files must be a sequence of paths or records, got {files!r:.60}")
    if workers is not None:
        require_whole_number("workers", workers, least=1)
    (name,) = check_signals([signal or model.signal], model.signal_names)
    threshold = model.calibrated().threshold(name, false_positive_rate)
    files, order = itertools.tee(files)
    prepared = dataclasses.asdict(model.preprocessing)
    batches = stream_images(files, **prepared, workers=workers, batch_size=batch_size)
    judge = functools.partial(_results, model, name, threshold)
    return _in_order(order, _scored(model.freeze(), judge, batch_size, batches))


Batch = tuple[Tensor, list[Record], list[Failure]]
Launched = Callable[[], dict[str, np.ndarray]]


def _scored(
    frozen: Scorer,
    judge: Callable[[Launched, Batch], tuple[list[Score], list[Score]]],
    batch_size: int,
    batches: Iterable[Batch],
) -> Iterator[tuple[list[Score], list[Score]]]:
    """Yield the results of files that could be read, and of the others, batch by batch."""
    # On a GPU the next batch is launched before the last one is read back; on a CPU that would only add latency.
    ahead = 1 if frozen.device.type == "cuda" else 0
    waiting: deque[Callable[[], tuple[list[Score], list[Score]]]] = deque()
    for batch in batches:
        images, records, _ = batch
        with stage("batch"):
            launched = frozen.launch_signals(images, batch_size=batch_size) if records else dict
        waiting.append(functools.partial(judge, launched, batch))
        if len(waiting) > ahead:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def _results(
    model: AnomalyModel, name: str, threshold: float | None, launched: Launched, batch: Batch
) -> tuple[list[Score], list[Score]]:
    """Wait for a batch's signals and return its results, and those of the files that could not be read."""
    images, records, failures = batch
    failed = [Score(failure.path, reason=failure.reason) for failure in failures]
    if not records:
        return [], failed
    signals = launched()
    probability = model.calibrated().probability(name, signals[name])
    scores = []
    for i, record in enumerate(records):
        score = Score(record.path, record.label, record.finding, for_processing=record.for_processing)
        values = {key: float(column[i]) for key, column in signals.items()}
        wrong = next((key for key, value in values.items() if not np.isfinite(value)), None)
        if wrong is not None:
            scores.append(dataclasses.replace(score, reason=f"the signal {wrong} is {values[wrong]}"))
            continue
        flagged = None if threshold is None else values[name] > threshold
        image = images[i, 0].numpy()
        scores.append(
            dataclasses.replace(
                score,
                score=float(probability[i]),
                flagged=flagged,
                signals=values,
                image=image,
                provenance=record.provenance,
            )
        )
    return scores, failed


def _in_order(
    files: Iterator[Record | str | os.PathLike], batches: Iterable[tuple[list[Score], list[Score]]]
) -> Iterator[Score]:
    """Put failures back between the scores, in the order of the files."""
    for scores, failed in batches:
        waiting, missing = iter(scores), iter(failed)
        failure = next(missing, None)
        for file in itertools.islice(files, len(scores) + len(failed)):
            record = file if isinstance(file, Record) else Record(os.fspath(file))
            if failure is not None and failure.path == record.path:
                yield Score(record.path, record.label, record.finding, reason=failure.reason)
                failure = next(missing, None)
            else:
                yield next(waiting)

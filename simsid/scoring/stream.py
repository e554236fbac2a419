"""Scoring films with a trained model: streams of files, labelled evaluations, and pictures for reports."""

import dataclasses
import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from simsid import metrics
from simsid.data import Failure, ImageSet, Record, load_images, stream_images
from simsid.kernels.ranges import stage
from simsid.metrics import Evaluation
from simsid.models import signals
from simsid.models.model import BATCH, Model
from simsid.report.page import Example


@dataclass(frozen=True)
class Score:
    """What became of one file.

    `score` in 0..1, 1 is anomalous; `alarm` whether the model's signal lies above the threshold (None without one);
    `signals` the raw values by name. A file that could not be read has `reason` and nothing else.
    """

    path: str
    reason: str = ""
    score: float | None = None
    alarm: bool | None = None
    signals: dict[str, float] = dataclasses.field(default_factory=dict)


def threshold(model: Model, false_alarm_rate: float = 0.05, signal: str | None = None) -> float | None:
    """Return the raw threshold above which at most `false_alarm_rate` of held-out normal films lie.

    None where the model was calibrated without held-out films. `signal` defaults to the model's own.

    Raises:
        CalibrationError: the model has not been calibrated.
        ValueError: a rate that does not lie strictly between 0 and 1.
    """
    if not 0 < false_alarm_rate < 1:
        raise ValueError(f"false_alarm_rate must lie strictly between 0 and 1, got {false_alarm_rate!r}")
    held = model.calibrated().holdout.get(signal or model.signal)
    return metrics.normal_threshold(np.asarray(held), false_alarm_rate) if held else None


def preparation(model: Model) -> dict[str, object]:
    """Return the options by which `simsid.data` prepares films for this model."""
    config = model.config
    return {"image_size": config.image_size, "aspect": config.aspect, "intensity": config.intensity}


def score_files(
    model: Model,
    files: Iterable[Record | str | os.PathLike],
    *,
    false_alarm_rate: float = 0.05,
    batch_size: int = BATCH,
    workers: int | None = None,
) -> Iterator[Score]:
    """Score files in bounded memory, one `Score` for every file, in their order, unreadable ones included.

    A file's score depends on nothing but the file: every batch has the same size.

    Raises:
        CalibrationError: the model has not been calibrated.
        ValueError: at the call, a rate or batch size out of range; never for a file.
    """
    limit = threshold(model, false_alarm_rate)
    files, order = itertools.tee(files)
    batches = stream_images(files, **preparation(model), workers=workers, batch_size=batch_size)
    return _in_order(order, _scored(model, limit, batch_size, batches))


def _scored(
    model: Model, limit: float | None, batch_size: int, batches: Iterable[tuple[Tensor, list[Record], list[Failure]]]
) -> Iterator[tuple[list[Score], list[Score]]]:
    """Yield the scores of what could be read, and of what could not, batch by batch."""
    # A GPU has the next batch before the last one is read back; a CPU would only be late.
    ahead = 1 if model.device.type == "cuda" else 0
    waiting: deque[Callable[[], tuple[list[Score], list[Score]]]] = deque()
    for images, records, failures in batches:
        with stage("batch"):
            found = model.launch_signals(images, batch_size=batch_size) if records else dict
        waiting.append(functools.partial(_read_back, model, limit, found, records, failures))
        if len(waiting) > ahead:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def _read_back(
    model: Model,
    limit: float | None,
    launched: Callable[[], dict[str, np.ndarray]],
    records: list[Record],
    failures: list[Failure],
) -> tuple[list[Score], list[Score]]:
    failed = [Score(failure.path, failure.reason) for failure in failures]
    if not records:
        return [], failed
    name, found = model.signal, launched()
    probability = model.calibrated().probability(name, found[name])
    scores = []
    for i, record in enumerate(records):
        values = {key: float(column[i]) for key, column in found.items()}
        alarm = None if limit is None else values[name] > limit
        scores.append(Score(record.path, score=float(probability[i]), alarm=alarm, signals=values))
    return scores, failed


def _in_order(
    files: Iterator[Record | str | os.PathLike], batches: Iterable[tuple[list[Score], list[Score]]]
) -> Iterator[Score]:
    """Put failures back between the scores, where their files stood."""
    for scores, failed in batches:
        waiting, missing = iter(scores), iter(failed)
        failure = next(missing, None)
        for file in itertools.islice(files, len(scores) + len(failed)):
            path = file.path if isinstance(file, Record) else os.fspath(file)
            if failure is not None and failure.path == path:
                yield failure
                failure = next(missing, None)
            else:
                yield next(waiting)


def require_labels(labels: Iterable[int | None]) -> None:
    """Refuse labels that cannot be evaluated: -1 or None (unknown) among them, or one kind only.

    Raises:
        ValueError: saying how many there are of what.
    """
    labels = [-1 if label is None else int(label) for label in labels]
    unknown, normal, abnormal = (labels.count(value) for value in (-1, 0, 1))
    if unknown:
        raise ValueError(f"evaluation needs a label for every image, got {unknown} of {len(labels)} without one")
    if not normal or not abnormal:
        raise ValueError(f"evaluation needs normal and abnormal images, got {normal} normal and {abnormal} abnormal")


def evaluate(model: Model, images: ImageSet, *, false_alarm_rate: float = 0.05) -> Evaluation:
    """Return every signal of a labelled set, with thresholds from the model's held-out normal films.

    Raises:
        CalibrationError: the model has not been calibrated.
        ValueError: an image without a label, labels of one kind only, or a rate out of range.
    """
    require_labels(images.labels)
    threshold(model, false_alarm_rate)
    holdout = {name: np.asarray(values) for name, values in model.calibrated().holdout.items()}
    return Evaluation(
        labels=images.labels,
        findings=[
            finding or ("abnormal" if label else "normal") for finding, label in zip(images.findings, images.labels)
        ],
        paths=images.paths,
        signals=model.signals(images.batches()),
        default=model.signal,
        holdout=holdout or None,
        false_positive_rate=false_alarm_rate,
    )


def examples(model: Model, images: ImageSet, scores: np.ndarray, places: Iterable[int]) -> list[Example]:
    """Return the images at `places` with reconstruction and heat map; `scores` `[n]` are what the page shows."""
    places = [int(place) for place in places]
    if not places:
        return []
    batch = images.batch(places)
    reconstruction = model.reconstruct(batch)
    heat = signals.heat_map(batch, reconstruction)
    return [
        Example(
            path=record.path,
            finding=record.finding,
            label=record.label,
            score=float(scores[place]),
            input=batch[i, 0].numpy(),
            reconstruction=reconstruction[i, 0].numpy(),
            heat_map=heat[i].numpy(),
        )
        for i, (place, record) in enumerate(zip(places, (images.records[place] for place in places)))
    ]


def typical_places(evaluation: Evaluation, each: int = 3) -> list[int]:
    """Return places to show: of every kind of image, normal first, those at even steps through its scores."""
    values = evaluation.signals[evaluation.default]
    groups = [np.flatnonzero(evaluation.labels == 0)]
    groups += [
        np.flatnonzero(
            [finding == kind and label == 1 for finding, label in zip(evaluation.findings, evaluation.labels)]
        )
        for kind in evaluation.kinds
    ]
    chosen: list[int] = []
    for group in groups:
        ordered = group[np.argsort(values[group], kind="stable")]
        steps = np.unique(np.linspace(0, len(ordered) - 1, 2 * each + 1).round().astype(int)[1::2])
        chosen += ordered[steps].tolist()
    return chosen


def examples_of_files(model: Model, scores: Iterable[Score], count: int) -> list[Example]:
    """Return the `count` files with the highest scores, read again for their pictures."""
    read = [score for score in scores if not score.reason]
    top = sorted(read, key=lambda score: -score.signals[model.signal])[:count]
    if not top:
        return []
    images = load_images([score.path for score in top], **preparation(model))
    value = {score.path: score.score for score in top}
    return examples(model, images, np.array([value[path] for path in images.paths]), range(len(images)))

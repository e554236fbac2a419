"""A model measured on labelled images: every signal, its figures and the table of them."""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from simsid import metrics
from simsid.arguments import require_instance
from simsid.data import ImageSet, Record
from simsid.errors import InputError
from simsid.metrics import check_labels, check_rate, check_scores
from simsid.models.base import AnomalyModel
from simsid.models.signals import check_signals
from simsid.scoring.stream import Score

IN_SAMPLE = (
    "The held-out normal images are among those evaluated: sens., spec. and the false positive rate are in-sample."
)


@dataclass(frozen=True)
class Row:
    """The figures of one signal on one kind of finding against all normal images.

    The `best_*` figures use the threshold of highest accuracy on the evaluated images themselves, as the papers report
    them: they are optimistic, since nobody knows that threshold beforehand. The last six stand at a threshold from
    held-out normal images, which is what a user can act on; they are None where there are no held-out images.
    """

    finding: str | None  # one kind of finding, or None for all abnormal images together
    signal: str
    normal: int  # images
    abnormal: int  # images
    auc: float
    low: float  # 95 % confidence interval of the AUC
    high: float
    average_precision: float
    best_threshold: float
    best_accuracy: float
    best_f1: float
    threshold: float | None
    false_positive_rate: float | None  # measured on the evaluated normal images, 1 - specificity
    accuracy: float | None
    f1: float | None
    sensitivity: float | None
    specificity: float | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The scores of a labelled set of images under every signal, checked when it is made.

    Args:
        labels: `[n]`, 0 for normal and 1 for abnormal; both must occur.
        findings: the kind of each image (`"NORMAL"`, `"missing"`, ...); the kinds of abnormal images become rows. An
            image with several, separated by semicolons (`"Edema; Fracture"`), counts in the row of each.
        paths: the file each score belongs to.
        signals: name to `[n]` raw scores, higher = more anomalous, finite; kept as float64.
        default: the model's default signal, a key of `signals`; it comes first everywhere.
        holdout: raw scores of held-out *normal* images per signal, of any number, from which the thresholds come; a
            signal that it lacks has no threshold. None: no thresholds.
        false_positive_rate: the share of normal images that may be flagged, strictly between 0 and 1.

    Raises:
        InputError: a length, label, score, default or rate outside these ranges; the message names the signal.
    """

    labels: np.ndarray
    findings: list[str]
    paths: list[str]
    signals: dict[str, np.ndarray]
    default: str
    holdout: dict[str, np.ndarray] | None = None
    false_positive_rate: float = 0.05

    def __post_init__(self) -> None:
        labels = check_labels(self.labels)
        for name, values in (("findings", self.findings), ("paths", self.paths)):
            if len(values) != len(labels):
                raise InputError(f"{name} must have one entry an image, got {len(values)} for {len(labels)} labels")
        if self.default not in self.signals:
            raise InputError(f"default must be one of the signals {sorted(self.signals)}, got {self.default!r}")
        order = [self.default, *(name for name in self.signals if name != self.default)]
        signals = {name: check_scores(self.signals[name], f"signal {name!r}", len(labels)) for name in order}
        holdout = self.holdout
        if holdout is not None:
            holdout = {name: check_scores(scores, f"held-out signal {name!r}") for name, scores in holdout.items()}
        check_rate("false_positive_rate", self.false_positive_rate)
        for name, value in (("labels", labels), ("signals", signals), ("holdout", holdout)):
            object.__setattr__(self, name, value)

    @property
    def kinds(self) -> list[str]:
        """The kinds of finding among the abnormal images, in alphabetical order."""
        return sorted({kind for found, label in zip(self._kinds_of_each, self.labels) if label == 1 for kind in found})

    @property
    def in_sample(self) -> bool:
        """Whether the thresholds come from images that are evaluated here, so that their figures are in-sample.

        That is so where most of the held-out images are evaluated, or most of the evaluated normal ones were held out.
        Equal scores show it: a signal has the same value, bit for bit, whenever an image is scored.
        """
        held = (self.holdout or {}).get(self.default)
        if held is None:
            return False
        normal = self.signals[self.default][self.labels == 0]
        return bool(max(np.isin(held, normal).mean(), np.isin(normal, held).mean()) > 0.5)

    def subset(self, finding: str | None) -> np.ndarray:
        """Return the mask `[n]` of the normal images and the abnormal ones of a kind; None keeps every image."""
        if finding is None:
            return np.ones(len(self.labels), dtype=bool)
        return (self.labels == 0) | np.array([finding in found for found in self._kinds_of_each])

    @cached_property
    def _kinds_of_each(self) -> list[list[str]]:
        return [[kind.strip() for kind in finding.split(";")] for finding in self.findings]

    def thresholds(self) -> dict[str, float]:
        """Return the threshold of each signal that has held-out normal images, by `normal_threshold`."""
        holdout = self.holdout or {}
        return {
            name: metrics.normal_threshold(holdout[name], self.false_positive_rate)
            for name in self.signals
            if name in holdout
        }

    def rows(self) -> list[Row]:
        """Return the figures of each signal, the default first: over all abnormal images, then kind by kind."""
        thresholds = self.thresholds()
        rows = []
        for signal, scores in self.signals.items():
            for finding in (None, *self.kinds):
                mask = self.subset(finding)
                rows.append(_row(finding, signal, self.labels[mask], scores[mask], thresholds.get(signal)))
        return rows


def require_labels(labels: Iterable[int | None]) -> None:
    """Refuse labels that cannot be evaluated: -1 or None (unknown) among them, or one class only.

    Raises:
        InputError: with the number of images of each class.
    """
    labels = [-1 if label is None else int(label) for label in labels]
    unknown, normal, abnormal = (labels.count(value) for value in (-1, 0, 1))
    if unknown:
        raise InputError(
            f"evaluation needs a label for every image, got {unknown} of {len(labels)} without one; list the images in "
            "a CSV with the columns path and label"
        )
    if not normal or not abnormal:
        raise InputError(f"evaluation needs normal and abnormal images, got {normal} normal and {abnormal} abnormal")


def evaluate(
    model: AnomalyModel,
    images: ImageSet,
    *,
    false_positive_rate: float = 0.05,
    signal: str | None = None,
) -> Evaluation:
    """Measure every signal of a labelled set, with thresholds from the model's held-out normal images.

    Args:
        model: any calibrated model.
        images: labelled images, normal and abnormal.
        false_positive_rate: the share of normal images that the thresholds may flag, strictly between 0 and 1.
        signal: the signal that comes first; None is the model's own.

    Raises:
        CalibrationError: the model has not been calibrated.
        InputError: an image without a label, labels of one class only, an unknown signal, or a rate out of range.
    """
    require_instance("model", model, AnomalyModel)
    require_instance("images", images, ImageSet)
    require_labels(images.labels)
    check_rate("false_positive_rate", false_positive_rate)
    (default,) = check_signals([signal or model.signal], model.signal_names)
    holdout = {name: np.asarray(values) for name, values in model.calibrated().holdout.items()}
    return Evaluation(
        labels=images.labels,
        findings=[
            finding or ("abnormal" if label else "normal") for finding, label in zip(images.findings, images.labels)
        ],
        paths=images.paths,
        signals=model.signals(images),
        default=default,
        holdout=holdout or None,
        false_positive_rate=false_positive_rate,
    )


def scores_of(
    model: AnomalyModel, images: ImageSet, evaluation: Evaluation, records: Iterable[Record] | None = None
) -> Iterator[Score]:
    """Yield a result for every image evaluated and for every file that could not be read, as scoring gives them.

    Args:
        records: what was to be read, in whose order the results come. None: the failed files come last, without labels.
    """
    reasons = {failure.path: failure.reason for failure in images.failures}
    if records is None:
        records = [*images.records, *(Record(path) for path in reasons)]
    scored = _scored(model, images, evaluation)
    for record in records:
        if record.path in reasons:
            yield Score(record.path, record.label, record.finding, reason=reasons[record.path])
        else:
            yield next(scored)


def _scored(model: AnomalyModel, images: ImageSet, evaluation: Evaluation) -> Iterator[Score]:
    name = evaluation.default
    threshold = evaluation.thresholds().get(name)
    probability = model.calibrated().probability(name, evaluation.signals[name])
    for i, record in enumerate(images.records):
        signals = {key: float(values[i]) for key, values in evaluation.signals.items()}
        flagged = None if threshold is None else signals[name] > threshold
        yield Score(record.path, record.label, record.finding, float(probability[i]), flagged, signals)


def format_table(evaluation: Evaluation) -> str:
    """Lay the figures out as plain text for a terminal, one block a signal, with the optimistic figures marked."""
    rows = evaluation.rows()
    head = ["signal", "finding", "abn.", "norm.", "AUC", "95 % interval", "AP"]
    held_out = any(row.threshold is not None for row in rows)
    if held_out:
        head += ["sens.", "spec.", "acc.", "F1"]
    head += ["acc.*", "F1*"]
    lines = []
    for row, previous in zip(rows, [None, *rows]):
        first = previous is None or previous.signal != row.signal
        finding = "all abnormal" if row.finding is None else row.finding
        cells = [row.signal if first else "", finding, str(row.abnormal), str(row.normal)]
        cells += [f"{row.auc:.3f}", f"{row.low:.3f} - {row.high:.3f}", f"{row.average_precision:.3f}"]
        if held_out:
            cells += [_figure(value) for value in (row.sensitivity, row.specificity, row.accuracy, row.f1)]
        lines.append(cells + [_figure(row.best_accuracy), _figure(row.best_f1)])
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
    text = []
    for line in [head, ["-" * width for width in widths], *lines]:
        cells = [cell.ljust(w) if column < 2 else cell.rjust(w) for column, (cell, w) in enumerate(zip(line, widths))]
        text.append("  ".join(cells).rstrip())
    if held_out:
        text.append("sens., spec., acc., F1: at a threshold from held-out normal images.")
        if evaluation.in_sample:
            text.append(IN_SAMPLE)
    text.append("* optimistic: at the threshold of highest accuracy on these very images.")
    return "\n".join(text)


def _row(finding: str | None, signal: str, labels: np.ndarray, scores: np.ndarray, threshold: float | None) -> Row:
    """Compute one row; `threshold` comes from held-out normal images."""
    area = metrics.auc(labels, scores)
    best_threshold = metrics.best_threshold(labels, scores)
    best = metrics.rates(labels, scores, best_threshold)
    held_out: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(metrics.Rates))
    if threshold is not None:
        held_out = dataclasses.asdict(metrics.rates(labels, scores, threshold))
    return Row(
        finding=finding,
        signal=signal,
        normal=int(np.sum(labels == 0)),
        abnormal=int(np.sum(labels == 1)),
        auc=area.value,
        low=area.low,
        high=area.high,
        average_precision=metrics.average_precision(labels, scores),
        best_threshold=best_threshold,
        best_accuracy=best.accuracy,
        best_f1=best.f1,
        threshold=threshold,
        **held_out,
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

"""How well anomaly scores tell abnormal images from normal ones, on raw float64 scores.

Everything is computed on scores as they come, never through a sigmoid, which ties the extremes. One convention holds
throughout: a higher score is more anomalous, and an image raises an alarm when its score lies strictly *above* the
threshold.
"""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class AUC:
    """Area under the ROC curve with the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Curves:
    """Points of the ROC and precision-recall curves, from the strictest threshold to the most lenient.

    `thresholds [t]` descend through the distinct scores; an image is counted as alarmed when its score is at or above
    one. The curves have a first point more, at which nothing alarms (precision 1 by convention).
    """

    thresholds: np.ndarray  # [t]
    false_positive_rate: np.ndarray  # [t + 1], from 0 to 1
    true_positive_rate: np.ndarray  # [t + 1], from 0 to 1
    precision: np.ndarray  # [t + 1]
    recall: np.ndarray  # [t + 1]


@dataclass(frozen=True)
class Row:
    """The figures of one signal on one kind of finding against all normal images.

    The `best_*` figures use the threshold of highest accuracy on the evaluated images themselves, as the papers report
    them: they are optimistic, since nobody knows that threshold beforehand. The last six stand at a threshold from
    held-out normal images, which is what a user can act on; they are None where there are no held-out images.
    """

    finding: str | None  # None: all abnormal images together
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
        findings: the kind of each image (`"NORMAL"`, `"missing"`, ...); the kinds of abnormal images become rows.
        paths: the file each score belongs to.
        signals: name to `[n]` raw scores, higher = more anomalous, finite; kept as float64.
        default: the model's default signal, a key of `signals`; it comes first everywhere.
        holdout: raw scores of held-out *normal* images per signal, of any number, from which the thresholds come; a
            signal that it lacks has no threshold. None: no thresholds.
        false_positive_rate: the fraction of normal images that may be flagged, strictly between 0 and 1.

    Raises:
        ValueError: a length, label, score, default or rate outside these ranges; the message names the signal.
    """

    labels: np.ndarray
    findings: list[str]
    paths: list[str]
    signals: dict[str, np.ndarray]
    default: str
    holdout: dict[str, np.ndarray] | None = None
    false_positive_rate: float = 0.05

    def __post_init__(self) -> None:
        labels = _check_labels(self.labels)
        for name, values in (("findings", self.findings), ("paths", self.paths)):
            if len(values) != len(labels):
                raise ValueError(f"{name} must have one entry an image, got {len(values)} for {len(labels)} labels")
        if self.default not in self.signals:
            raise ValueError(f"default must be one of the signals {sorted(self.signals)}, got {self.default!r}")
        order = [self.default, *(name for name in self.signals if name != self.default)]
        signals = {name: _check_scores(self.signals[name], f"signal {name!r}", len(labels)) for name in order}
        holdout = self.holdout
        if holdout is not None:
            holdout = {name: _check_scores(scores, f"held-out signal {name!r}") for name, scores in holdout.items()}
        _check_rate("false_positive_rate", self.false_positive_rate)
        for name, value in (("labels", labels), ("signals", signals), ("holdout", holdout)):
            object.__setattr__(self, name, value)

    @property
    def kinds(self) -> list[str]:
        """The kinds of finding among the abnormal images, in alphabetical order."""
        return sorted({finding for finding, label in zip(self.findings, self.labels) if label == 1})

    @property
    def in_sample(self) -> bool:
        """Whether the thresholds come from images that are evaluated here, so that their figures are in-sample.

        Equal scores show it: a signal has the same value, bit for bit, whenever an image is scored.
        """
        held = (self.holdout or {}).get(self.default)
        if held is None:
            return False
        return bool(np.isin(held, self.signals[self.default][self.labels == 0]).mean() > 0.5)

    def subset(self, finding: str | None) -> np.ndarray:
        """Return the mask `[n]` of the normal images and the abnormal ones of a kind; None keeps every image."""
        if finding is None:
            return np.ones(len(self.labels), dtype=bool)
        return (self.labels == 0) | (np.asarray(self.findings, dtype=object) == finding)

    def thresholds(self) -> dict[str, float]:
        """Return the threshold of each signal that has held-out normal images, by `normal_threshold`."""
        holdout = self.holdout or {}
        return {
            name: normal_threshold(holdout[name], self.false_positive_rate) for name in self.signals if name in holdout
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


def auc(labels: np.ndarray, scores: np.ndarray, confidence: float = 0.95) -> AUC:
    """Compute the area under the ROC curve and its confidence interval.

        AUC = mean over pairs of [abnormal > normal] + [abnormal = normal] / 2
        var = var(V10) / m + var(V01) / n         V10, V01: each image's share of pairs in the right order
        interval = sigmoid(logit(AUC) -+ z sqrt(var) / (AUC (1 - AUC)))

    Source: DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988), for the variance; the logit scale keeps the
    interval within 0..1 and covers better near 1 (Qin and Hotilovac, Stat. Methods Med. Res. 17 (2008)).

    Where the variance estimate says nothing, a bound takes its place, so that an interval never has zero width:

    - *Perfect separation* (AUC 1; mirrored for 0). The images hold `k = min(m, n)` disjoint abnormal-normal pairs, all
      in the right order, which happens with probability `AUC^k` at most; so the interval is `[(alpha / 2)^(1/k), 1]`,
      that of Clopper and Pearson for k successes of k, about `[1 - 3.7 / k, 1]` at 95 %. It is wider than DeLong's at
      one wrong pair, whose variance comes out too small that close to 1.
    - *One image of a class, or no spread* (all scores tied): `var = AUC (1 - AUC) / k`, the largest that any two
      distributions with that AUC can have (Birnbaum and Klose, Ann. Math. Stat. 28 (1957)).

    Args:
        labels: `[n]`, 0 for normal and 1 for abnormal.
        scores: `[n]`, higher = more anomalous; ties count half.
        confidence: of the two-sided interval, strictly between 0 and 1.

    Raises:
        ValueError: only one class, other labels, NaN or infinite scores, unequal lengths, `confidence` out of range.
    """
    labels, scores = _check(labels, scores)
    _check_rate("confidence", confidence)
    abnormal, normal = scores[labels == 1], scores[labels == 0]
    share_abnormal = _share_below(abnormal, normal)
    share_normal = 1.0 - _share_below(normal, abnormal)
    value = float(share_abnormal.mean())
    pairs = min(len(abnormal), len(normal))
    # Float means can miss 1 by a rounding error; the orders of the extremes cannot.
    if abnormal.min() > normal.max():
        return AUC(1.0, ((1.0 - confidence) / 2.0) ** (1.0 / pairs), 1.0)
    if abnormal.max() < normal.min():
        return AUC(0.0, 0.0, 1.0 - ((1.0 - confidence) / 2.0) ** (1.0 / pairs))
    variance = 0.0
    if pairs > 1:
        variance = float(share_abnormal.var(ddof=1) / len(abnormal) + share_normal.var(ddof=1) / len(normal))
    if variance <= 0.0:
        variance = value * (1.0 - value) / pairs
    centre = math.log(value / (1.0 - value))
    reach = NormalDist().inv_cdf((1.0 + confidence) / 2.0) * math.sqrt(variance) / (value * (1.0 - value))
    return AUC(value, _sigmoid(centre - reach), _sigmoid(centre + reach))


def curves(labels: np.ndarray, scores: np.ndarray) -> Curves:
    """Compute the points of the ROC and precision-recall curves, one for each distinct score and one for no alarm.

    Args:
        labels: `[n]`, 0 for normal and 1 for abnormal.
        scores: `[n]`, higher = more anomalous.

    Raises:
        ValueError: as `auc`.
    """
    labels, scores = _check(labels, scores)
    thresholds, hits, alarms = _counts(labels, scores)
    abnormal, normal = hits[-1], alarms[-1]
    recall = np.concatenate([[0.0], hits / abnormal])
    return Curves(
        thresholds=thresholds,
        false_positive_rate=np.concatenate([[0.0], alarms / normal]),
        true_positive_rate=recall,
        precision=np.concatenate([[1.0], hits / (hits + alarms)]),
        recall=recall,
    )


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Compute the area under the precision-recall steps, `sum_t (recall_t - recall_(t-1)) precision_t`.

    Args and raises as `auc`. Chance is the share of abnormal images, so it depends on the set, unlike the AUC.
    """
    points = curves(labels, scores)
    return float(np.sum(np.diff(points.recall) * points.precision[1:]))


def normal_threshold(holdout: np.ndarray, false_positive_rate: float) -> float:
    """Choose the threshold that lets a given share of normal images raise an alarm, from held-out normals alone.

    The threshold is the j-th smallest of the n held-out scores, `j = n + 1 - floor((n + 1) rate)`, the conservative
    order statistic of split conformal prediction: a new normal image, exchangeable with these, scores strictly above
    it with probability `floor((n + 1) rate) / (n + 1)` at most, which is never above the rate, for any distribution.

    With fewer than `1 / rate - 1` images no order statistic can promise the rate (19 are needed for 5 %); the largest
    score is returned with a warning that names the `1 / (n + 1)` it does promise.

    Args:
        holdout: `[n]` raw scores of normal images that neither training nor this evaluation has seen, `n >= 1`.
        false_positive_rate: strictly between 0 and 1.

    Raises:
        ValueError: no scores, NaN or infinite ones, or a rate out of range.
    """
    scores = np.sort(_check_scores(holdout, "holdout"))
    _check_rate("false_positive_rate", false_positive_rate)
    # The slack keeps (n + 1) rate = 0.99999... from losing an alarm that exact arithmetic would allow.
    allowed = math.floor((len(scores) + 1) * false_positive_rate + 1e-9)
    if allowed < 1:
        warnings.warn(
            f"{len(scores)} held-out normal images cannot promise a false positive rate of {false_positive_rate:g}: the "
            f"threshold is their largest score, good for {1 / (len(scores) + 1):.2g}",
            stacklevel=2,
        )
        allowed = 1
    return float(scores[len(scores) - allowed])


def format_table(rows: Iterable[Row]) -> str:
    """Lay the rows out as plain text for a terminal, one block a signal, with the optimistic figures marked."""
    rows = list(rows)
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
    text.append("* optimistic: at the threshold of highest accuracy on these very images.")
    return "\n".join(text)


def _row(finding: str | None, signal: str, labels: np.ndarray, scores: np.ndarray, threshold: float | None) -> Row:
    """Compute one row; `threshold` comes from held-out normals."""
    area = auc(labels, scores)
    best_threshold = _best_threshold(labels, scores)
    best = _rates(labels, scores, best_threshold)
    held_out = dict.fromkeys(("false_positive_rate", "accuracy", "f1", "sensitivity", "specificity"))
    if threshold is not None:
        held_out = _rates(labels, scores, threshold)
    return Row(
        finding=finding,
        signal=signal,
        normal=int(np.sum(labels == 0)),
        abnormal=int(np.sum(labels == 1)),
        auc=area.value,
        low=area.low,
        high=area.high,
        average_precision=average_precision(labels, scores),
        best_threshold=best_threshold,
        best_accuracy=best["accuracy"],
        best_f1=best["f1"],
        threshold=threshold,
        **held_out,
    )


def _rates(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
    """Count what scores above a threshold get right."""
    alarm = scores > threshold
    hits, false_alarms = int(np.sum(alarm & (labels == 1))), int(np.sum(alarm & (labels == 0)))
    abnormal, normal = int(np.sum(labels == 1)), int(np.sum(labels == 0))
    return {
        "false_positive_rate": false_alarms / normal,
        "accuracy": (hits + normal - false_alarms) / (abnormal + normal),
        "f1": 2 * hits / (hits + false_alarms + abnormal),
        "sensitivity": hits / abnormal,
        "specificity": 1.0 - false_alarms / normal,
    }


def _best_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """Find the threshold of highest accuracy; of equal ones that of higher F1, then the higher threshold."""
    distinct, hits, alarms = _counts(labels, scores)
    abnormal, normal = hits[-1], alarms[-1]
    hits, alarms = np.concatenate([[0.0], hits]), np.concatenate([[0.0], alarms])
    # Alarms lie strictly above a threshold: "at or above distinct[i]" is "above distinct[i + 1]".
    thresholds = np.concatenate([distinct, [np.nextafter(distinct[-1], -np.inf)]])
    correct = hits + normal - alarms
    f1 = np.where(correct == correct.max(), 2.0 * hits / (hits + alarms + abnormal), -1.0)
    return float(thresholds[np.argmax(f1)])


def _counts(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return distinct scores, descending, with the abnormal and the normal images at or above each, `[t]` float64."""
    distinct, place = np.unique(-scores, return_inverse=True)
    hits = np.cumsum(np.bincount(place, weights=labels == 1))
    alarms = np.cumsum(np.bincount(place, weights=labels == 0))
    return -distinct, hits, alarms


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return for each value the share of the others below it, ties counting half, in n log n."""
    others = np.sort(others)
    below, up_to = np.searchsorted(others, values, side="left"), np.searchsorted(others, values, side="right")
    return (below + up_to) / (2.0 * len(others))


def _sigmoid(x: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * x))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _check(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels = _check_labels(labels)
    return labels, _check_scores(scores, "scores", len(labels))


def _check_labels(labels: np.ndarray) -> np.ndarray:
    """Return labels as int64 `[n]`, all 0 or 1, both present."""
    array = np.asarray(labels)
    if array.ndim != 1:
        raise ValueError(f"labels must have one axis, got shape {list(array.shape)}")
    # Compared before any cast, which would turn 0.5 into a normal image.
    odd = [value for value in array.tolist() if value not in (0, 1)]
    if odd:
        raise ValueError(f"labels must be 0 (normal) or 1 (abnormal), got {odd[0]!r}")
    array = array.astype(np.int64)
    for label, name in ((0, "normal"), (1, "abnormal")):
        if label not in array:
            raise ValueError(f"labels must hold both classes, got no {name} image (label {label}) among {len(array)}")
    return array


def _check_scores(scores: np.ndarray, name: str, length: int | None = None) -> np.ndarray:
    """Return scores as float64 `[n]`, finite."""
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"{name} must be a row of one or more scores, got shape {list(array.shape)}")
    if length is not None and len(array) != length:
        raise ValueError(f"{name} must have one score an image, got {len(array)} for {length} labels")
    nans, infinite = int(np.isnan(array).sum()), int(np.isinf(array).sum())
    if nans or infinite:
        raise ValueError(f"{name} must be finite, got {nans} NaN and {infinite} infinite among {len(array)} scores")
    return array


def _check_rate(name: str, rate: float) -> None:
    if not 0.0 < rate < 1.0:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {rate!r}")

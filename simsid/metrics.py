"""How well anomaly scores separate abnormal images from normal ones, on raw float64 scores.

Everything is computed on scores as they come, never through a sigmoid, which ties the extremes. A higher score is more
anomalous, and an image is flagged when its score lies strictly *above* the threshold. Curves and average precision are
scikit-learn's.
"""

import math
import warnings
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from simsid.errors import InputError


@dataclass(frozen=True)
class AUC:
    """Area under the ROC curve with the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Rates:
    """What the images flagged by one threshold get right; a flagged abnormal image is a true positive."""

    false_positive_rate: float
    accuracy: float
    f1: float
    sensitivity: float
    specificity: float


@dataclass(frozen=True, eq=False)
class Curves:
    """Points of the ROC and precision-recall curves, from the strictest threshold to the most lenient.

    `thresholds [t]` descend through the distinct scores; an image counts as flagged when its score is at or above one.
    The curves begin with one point more, at which no image is flagged (precision 1 by convention).
    """

    thresholds: np.ndarray  # [t]
    false_positive_rate: np.ndarray  # [t + 1], from 0 to 1
    true_positive_rate: np.ndarray  # [t + 1], from 0 to 1; also the recall
    precision: np.ndarray  # [t + 1]


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
        InputError: only one class, other labels, NaN or infinite scores, unequal lengths, `confidence` out of range.
    """
    labels, scores = _check(labels, scores)
    check_rate("confidence", confidence)
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
    center = math.log(value / (1.0 - value))
    reach = NormalDist().inv_cdf((1.0 + confidence) / 2.0) * math.sqrt(variance) / (value * (1.0 - value))
    return AUC(value, _sigmoid(center - reach), _sigmoid(center + reach))


def curves(labels: np.ndarray, scores: np.ndarray) -> Curves:
    """Compute the points of the ROC and precision-recall curves, one for each distinct score and one for none flagged.

    Args:
        labels: `[n]`, 0 for normal and 1 for abnormal.
        scores: `[n]`, higher = more anomalous.

    Raises:
        InputError: as `auc`.
    """
    from sklearn.metrics import precision_recall_curve, roc_curve

    labels, scores = _check(labels, scores)
    false_positive_rate, true_positive_rate, thresholds = roc_curve(labels, scores, drop_intermediate=False)
    precision, _, _ = precision_recall_curve(labels, scores)
    return Curves(thresholds[1:], false_positive_rate, true_positive_rate, precision[::-1])


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Compute the area under the precision-recall steps, `sum_t (recall_t - recall_(t-1)) precision_t`.

    Args and raises as `auc`. Chance is the share of abnormal images, so it depends on the set, unlike the AUC.
    """
    from sklearn.metrics import average_precision_score

    labels, scores = _check(labels, scores)
    return float(average_precision_score(labels, scores))


def normal_threshold(holdout: np.ndarray, false_positive_rate: float) -> float:
    """Choose the threshold that lets a given share of normal images be flagged, from held-out normals alone.

    The threshold is the j-th smallest of the n held-out scores, `j = n + 1 - floor((n + 1) rate)`, the conservative
    order statistic of split conformal prediction: a new normal image, exchangeable with these, scores strictly above
    it with probability `floor((n + 1) rate) / (n + 1)` at most, which is never above the rate, for any distribution.

    With fewer than `1 / rate - 1` images no order statistic guarantees the rate (19 are needed for 5 %); the largest
    score is returned with a warning that names the `1 / (n + 1)` that it guarantees.

    Args:
        holdout: `[n]` raw scores of normal images that neither training nor this evaluation has seen, `n >= 1`.
        false_positive_rate: strictly between 0 and 1.

    Raises:
        InputError: no scores, NaN or infinite ones, or a rate out of range.
    """
    scores = np.sort(check_scores(holdout, "holdout"))
    check_rate("false_positive_rate", false_positive_rate)
    allowed = allowed_above(len(scores), false_positive_rate)
    if allowed < 1:
        warnings.warn(
            f"{len(scores)} held-out normal images cannot guarantee a false positive rate of {false_positive_rate:g}: "
            f"the threshold is their largest score, which guarantees {1 / (len(scores) + 1):.2g}",
            stacklevel=2,
        )
        allowed = 1
    return float(scores[len(scores) - allowed])


def allowed_above(count: int, false_positive_rate: float) -> int:
    """Return which of `count` held-out normal scores, from the largest, is the threshold; 0 where they are too few."""
    # The slack for (n + 1) rate = 0.99999..., which exact arithmetic would round up.
    return math.floor((count + 1) * false_positive_rate + 1e-9)


def false_positive_interval(count: int, false_positive_rate: float, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of the false positive rate that `normal_threshold` has on new images of the same origin.

    With the threshold at the j-th of `count` held-out scores, the share of new normal images above it follows a beta
    distribution with parameters `count + 1 - j` and `j` (the distribution of an order statistic), for any distribution
    of scores; the interval has equal tails.

    Args:
        count: held-out normal images.
        false_positive_rate: as `normal_threshold`.
        confidence: of the interval, strictly between 0 and 1.
    """
    from scipy.stats import beta

    check_rate("false_positive_rate", false_positive_rate)
    allowed = max(1, math.floor((count + 1) * false_positive_rate + 1e-9))
    tail = (1 - confidence) / 2
    low, high = beta.ppf([tail, 1 - tail], allowed, count + 1 - allowed)
    return float(low), float(high)


def rates(labels: np.ndarray, scores: np.ndarray, threshold: float) -> Rates:
    """Compare the images whose scores lie above a threshold with the labels; arguments as `auc`."""
    flagged = scores > threshold
    true_positives, false_positives = int(np.sum(flagged & (labels == 1))), int(np.sum(flagged & (labels == 0)))
    abnormal, normal = int(np.sum(labels == 1)), int(np.sum(labels == 0))
    return Rates(
        false_positive_rate=false_positives / normal,
        accuracy=(true_positives + normal - false_positives) / (abnormal + normal),
        f1=2 * true_positives / (true_positives + false_positives + abnormal),
        sensitivity=true_positives / abnormal,
        specificity=1.0 - false_positives / normal,
    )


def best_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """Find the threshold of highest accuracy; of equal ones that of higher F1, then the higher threshold."""
    points = curves(labels, scores)
    abnormal, normal = np.sum(labels == 1), np.sum(labels == 0)
    true_positives = np.rint(points.true_positive_rate * abnormal)
    false_positives = np.rint(points.false_positive_rate * normal)
    distinct = points.thresholds
    # Images are flagged strictly above a threshold: "at or above distinct[i]" is "above distinct[i + 1]".
    thresholds = np.concatenate([distinct, [np.nextafter(distinct[-1], -np.inf)]])
    correct = true_positives + normal - false_positives
    f1 = np.where(correct == correct.max(), 2.0 * true_positives / (true_positives + false_positives + abnormal), -1.0)
    return float(thresholds[np.argmax(f1)])


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return for each value the share of the others below it, ties counting half, in n log n."""
    others = np.sort(others)
    below, up_to = np.searchsorted(others, values, side="left"), np.searchsorted(others, values, side="right")
    return (below + up_to) / (2.0 * len(others))


def _sigmoid(x: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * x))


def _check(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels = check_labels(labels)
    return labels, check_scores(scores, "scores", len(labels))


def check_labels(labels: np.ndarray) -> np.ndarray:
    """Return labels as int64 `[n]`, all 0 or 1, both present."""
    array = np.asarray(labels)
    if array.ndim != 1:
        raise InputError(f"labels must have one axis, got shape {list(array.shape)}")
    # Compared before any cast, which would turn 0.5 into a normal image.
    odd = [value for value in array.tolist() if value not in (0, 1)]
    if odd:
        raise InputError(f"labels must be 0 (normal) or 1 (abnormal), got {odd[0]!r}")
    array = array.astype(np.int64)
    for label, name in ((0, "normal"), (1, "abnormal")):
        if label not in array:
            raise InputError(f"labels must hold both classes, got no {name} image (label {label}) among {len(array)}")
    return array


def check_scores(scores: np.ndarray, name: str, length: int | None = None) -> np.ndarray:
    """Return scores as float64 `[n]`, finite."""
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise InputError(f"{name} must be a row of one or more scores, got shape {list(array.shape)}")
    if length is not None and len(array) != length:
        raise InputError(f"{name} must have one score an image, got {len(array)} for {length} labels")
    nans, infinite = int(np.isnan(array).sum()), int(np.isinf(array).sum())
    if nans or infinite:
        raise InputError(f"{name} must be finite, got {nans} NaN and {infinite} infinite among {len(array)} scores")
    return array


def check_rate(name: str, rate: float) -> None:
    """Raise `InputError` unless a rate is a number strictly between 0 and 1."""
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0.0 < rate < 1.0:
        raise InputError(f"{name} must lie strictly between 0 and 1, got {rate!r}")

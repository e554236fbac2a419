"""AUC and its interval, curves, thresholds and their intervals, against other ways to compute them."""

import dataclasses
import math

import numpy as np
import pytest

from simsid.metrics import auc, average_precision, curves, false_positive_interval, normal_threshold


def some_scores(seed=0, abnormal=40, normal=60, shift=1.0, levels=None):
    """Gaussian scores; `levels` rounds them to a coarse grid, which ties many."""
    generator = np.random.default_rng(seed)
    labels = np.repeat([1, 0], [abnormal, normal])
    scores = generator.normal(size=abnormal + normal) + shift * labels
    if levels:
        scores = np.round(scores * levels) / levels
    order = generator.permutation(len(labels))
    return labels[order], scores[order]


def auc_by_pairs(labels, scores):
    points = 0.0
    abnormal, normal = scores[labels == 1], scores[labels == 0]
    for x in abnormal:
        for y in normal:
            points += 1.0 if x > y else 0.5 if x == y else 0.0
    return points / (len(abnormal) * len(normal))


def interval_by_loops(labels, scores, z):
    """DeLong's covariance written out pair by pair, and the interval on the logit scale."""
    abnormal, normal = scores[labels == 1], scores[labels == 0]
    m, n = len(abnormal), len(normal)
    wins = [[1.0 if x > y else 0.5 if x == y else 0.0 for y in normal] for x in abnormal]
    area = sum(sum(row) for row in wins) / (m * n)
    v10 = [sum(row) / n for row in wins]
    v01 = [sum(wins[i][j] for i in range(m)) / m for j in range(n)]
    s10 = sum((v - area) ** 2 for v in v10) / (m - 1)
    s01 = sum((v - area) ** 2 for v in v01) / (n - 1)
    error = math.sqrt(s10 / m + s01 / n) / (area * (1 - area))
    ends = [math.log(area / (1 - area)) + sign * z * error for sign in (-1, 1)]
    return [1 / (1 + math.exp(-end)) for end in ends]


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("seed", range(3))
def test_auc_matches_pair_counting_and_scikit_learn(seed, levels):
    from sklearn.metrics import roc_auc_score

    labels, scores = some_scores(seed, levels=levels)
    area = auc(labels, scores)
    assert area.value == pytest.approx(auc_by_pairs(labels, scores), abs=1e-14)
    assert area.value == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize(("confidence", "z"), [(0.95, 1.959963984540054), (0.8, 1.2815515655446004)])
def test_interval_matches_delong_written_out(levels, confidence, z):
    for shift in (-2.0, 0.0, 1.5):
        labels, scores = some_scores(3, shift=shift, levels=levels)
        area = auc(labels, scores, confidence)
        assert [area.low, area.high] == pytest.approx(interval_by_loops(labels, scores, z), rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_interval_covers_the_truth_as_often_as_it_says(shift):
    truth = 0.5 * math.erfc(-shift / 2.0)
    intervals = [auc(*some_scores(seed, 30, 40, shift)) for seed in range(1500)]
    coverage = np.mean([area.low <= truth <= area.high for area in intervals])
    assert 0.935 <= coverage <= 0.975


def test_auc_does_not_saturate():
    labels = np.array([0, 0, 1, 1])
    assert auc(labels, np.array([100.0, 101.0, 102.0, 103.0])).value == 1.0
    tiny = 1.0 + np.array([0, 1, 2, 3]) * 1e-14  # equal in float32
    assert auc(labels, tiny).value == 1.0


@pytest.mark.parametrize("count", [1, 5, 100])
def test_perfect_separation_has_an_exact_bound(count):
    labels = np.repeat([0, 1], [count + 3, count])
    area = auc(labels, labels.astype(float))
    assert (area.value, area.high) == (1.0, 1.0)
    assert area.low == pytest.approx(0.025 ** (1 / count))
    mirrored = auc(labels, -labels.astype(float))
    assert dataclasses.astuple(mirrored) == pytest.approx((0.0, 0.0, 1.0 - area.low))


def test_intervals_never_have_zero_width():
    tied = auc([0] * 16 + [1] * 16, np.zeros(32))
    assert tied.value == 0.5
    assert tied.low == pytest.approx(1 / (1 + math.exp(1.959964 * 2 / 4)), rel=1e-6)
    alone = auc([1, 0, 0, 0], [2.5, 1.0, 2.0, 3.0])
    assert alone.value == pytest.approx(2 / 3)
    assert alone.low < 0.1
    assert alone.high > 0.9
    nearly = auc([0, 0, 1, 1], [0.0, 1.0, 1.0, 2.0])
    assert 0.0 < nearly.low < nearly.value < nearly.high < 1.0


@pytest.mark.parametrize("levels", [None, 2])
def test_curves_match_scikit_learn(levels):
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

    labels, scores = some_scores(5, levels=levels)
    points = curves(labels, scores)
    false_positives, true_positives, _ = roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(points.false_positive_rate, false_positives, atol=1e-15)
    np.testing.assert_allclose(points.true_positive_rate, true_positives, atol=1e-15)
    precision, recall, _ = precision_recall_curve(labels, scores)
    np.testing.assert_allclose(points.precision, precision[::-1], atol=1e-15)
    np.testing.assert_allclose(points.true_positive_rate, recall[::-1], atol=1e-15)
    assert average_precision(labels, scores) == pytest.approx(average_precision_score(labels, scores), abs=1e-14)
    trapezoids = np.sum(
        np.diff(points.false_positive_rate) * (points.true_positive_rate[1:] + points.true_positive_rate[:-1])
    )
    assert trapezoids / 2 == pytest.approx(auc(labels, scores).value, abs=1e-14)


def test_normal_threshold_is_the_documented_order_statistic():
    scores = np.random.default_rng(0).permutation(np.arange(1.0, 100.0))  # 1 .. 99
    assert normal_threshold(scores, 0.05) == 95.0
    assert normal_threshold(scores, 0.01) == 99.0
    assert normal_threshold(scores, 0.055) == 95.0  # never above the rate
    assert normal_threshold(np.arange(1.0, 20.0), 0.05) == 19.0
    assert normal_threshold(np.arange(1.0, 10.0), 0.3) == 7.0  # (n + 1) rate is 3 but for rounding


@pytest.mark.parametrize(("count", "rate"), [(19, 0.05), (50, 0.1), (200, 0.05)])
def test_normal_threshold_keeps_the_false_positive_rate(count, rate):
    generator = np.random.default_rng(1)
    rates = [
        np.mean(generator.standard_cauchy(500) > normal_threshold(generator.standard_cauchy(count), rate))
        for _ in range(2000)
    ]
    guaranteed = math.floor((count + 1) * rate + 1e-9) / (count + 1)
    assert np.mean(rates) == pytest.approx(guaranteed, abs=0.006)
    assert np.mean(rates) <= rate + 0.004


def test_normal_threshold_warns_when_too_few():
    with pytest.warns(UserWarning, match=r"10 held-out normal images cannot guarantee .* 0.05.*guarantees 0.091"):
        assert normal_threshold(np.arange(10.0), 0.05) == 9.0


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 0, 0], [1, 2, 3], r"no abnormal image \(label 1\) among 3"),
        ([1, 1], [1, 2], r"no normal image"),
        ([], [], r"no normal image .* among 0"),
        ([0, 2], [1, 2], r"labels must be 0 \(normal\) or 1 \(abnormal\), got 2"),
        ([0.5, 1], [1, 2], r"got 0.5"),
        (["0", "1"], [1, 2], r"got '0'"),
        ([[0, 1]], [1, 2], r"one axis"),
        ([0, 1], [1, 2, 3], r"got 3 for 2 labels"),
        ([0, 1, 1], [1, np.nan, np.inf], r"scores must be finite, got 1 NaN and 1 infinite among 3"),
    ],
)
def test_bad_input_is_named(labels, scores, message):
    for function in (auc, curves, average_precision):
        with pytest.raises(ValueError, match=message):
            function(labels, scores)


@pytest.mark.parametrize(("count", "rate"), [(19, 0.05), (99, 0.1)])
def test_false_positive_interval_covers_the_rate_of_new_images(count, rate):
    generator = np.random.default_rng(2)
    low, high = false_positive_interval(count, rate)
    # Uniform scores: the share of new images above a threshold t is 1 - t.
    shares = np.array([1 - normal_threshold(generator.uniform(size=count), rate) for _ in range(4000)])
    assert np.mean(shares < low) == pytest.approx(0.025, abs=0.01)
    assert np.mean(shares > high) == pytest.approx(0.025, abs=0.01)
    with pytest.raises(ValueError, match="false_positive_rate must lie strictly between 0 and 1"):
        false_positive_interval(count, 0.0)

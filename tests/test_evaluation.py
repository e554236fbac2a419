"""`Evaluation`: rows of every signal and finding, thresholds, in-sample marks, the table, and `evaluate`."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import tiny
import torch

from simsid import Model, data
from simsid.evaluation import IN_SAMPLE, Evaluation, Row, evaluate, format_table, require_labels, scores_of
from simsid.metrics import AUC, auc, normal_threshold
from simsid.report import selection


def some_scores(seed=0, abnormal=40, normal=60, shift=1.0, levels=None):
    """Gaussian scores; `levels` rounds them to a coarse grid, which ties many."""
    generator = np.random.default_rng(seed)
    labels = np.repeat([1, 0], [abnormal, normal])
    scores = generator.normal(size=abnormal + normal) + shift * labels
    if levels:
        scores = np.round(scores * levels) / levels
    order = generator.permutation(len(labels))
    return labels[order], scores[order]


def some_evaluation(held_out=True, **changes):
    labels, scores = some_scores(abnormal=30, normal=50)
    kinds = np.where(labels == 0, "NORMAL", np.where(np.arange(len(labels)) % 2, "missing", "flipped"))
    fields = {
        "labels": labels,
        "findings": kinds.tolist(),
        "paths": [f"{i}.png" for i in range(len(labels))],
        "signals": {"residual": -scores, "discriminator_per_image": scores},
        "default": "discriminator_per_image",
        "holdout": {"discriminator_per_image": np.random.default_rng(9).normal(size=99)} if held_out else None,
    }
    return Evaluation(**{**fields, **changes})


def test_rows_are_one_for_each_signal_and_finding_with_the_default_first():
    rows = some_evaluation().rows()
    assert [(row.signal, row.finding) for row in rows] == [
        (signal, finding)
        for signal in ("discriminator_per_image", "residual")
        for finding in (None, "flipped", "missing")
    ]
    all_abnormal, *parts = rows[:3]
    assert (all_abnormal.normal, all_abnormal.abnormal) == (50, 30)
    assert sum(row.abnormal for row in parts) == 30
    assert all(row.normal == 50 for row in parts)
    weighted = sum(row.auc * row.abnormal for row in parts) / 30
    assert all_abnormal.auc == pytest.approx(weighted, abs=1e-12)
    assert rows[3].auc == pytest.approx(1.0 - all_abnormal.auc, abs=1e-12)


def test_image_with_several_findings_counts_in_the_row_of_each():
    findings = ["No Finding", "No Finding", "Edema", "Edema; Fracture", "Fracture;Pneumonia"]
    signals = {"residual": np.array([0.0, 2.0, 1.0, 3.0, -1.0])}
    evaluation = Evaluation(np.array([0, 0, 1, 1, 1]), findings, ["a"] * 5, signals, "residual")
    assert {row.finding: (row.normal, row.abnormal, row.auc) for row in evaluation.rows()} == {
        None: (2, 3, 0.5),
        "Edema": (2, 2, 0.75),
        "Fracture": (2, 2, 0.5),
        "Pneumonia": (2, 1, 0.0),
    }
    assert selection.typical_indices(evaluation, each=1) == [0, 2, 4]


def test_rows_measure_at_the_held_out_threshold():
    evaluation = some_evaluation()
    row = evaluation.rows()[0]
    flagged = evaluation.signals["discriminator_per_image"] > row.threshold
    abnormal = evaluation.labels == 1
    assert row.threshold == normal_threshold(evaluation.holdout["discriminator_per_image"], 0.05)
    assert row.sensitivity == np.mean(flagged[abnormal])
    assert row.false_positive_rate == np.mean(flagged[~abnormal])
    assert row.specificity == pytest.approx(np.mean(~flagged[~abnormal]))
    assert row.accuracy == np.mean(flagged == abnormal)
    true_positives = np.sum(flagged & abnormal)
    assert row.f1 == pytest.approx(2 * true_positives / (np.sum(flagged) + np.sum(abnormal)))


def test_rows_without_held_out_scores_have_no_threshold():
    names = ("threshold", "false_positive_rate", "accuracy", "f1", "sensitivity", "specificity")
    rows = some_evaluation(held_out=False).rows() + some_evaluation().rows()[3:]
    for row in rows:
        assert [getattr(row, name) for name in names] == [None] * 6
        others = {name: value for name, value in dataclasses.asdict(row).items() if name not in (*names, "finding")}
        assert None not in others.values()


def test_best_figures_match_a_search_over_every_threshold():
    for levels in (None, 2):
        labels, scores = some_scores(11, abnormal=12, normal=9, levels=levels)
        tried = []
        for threshold in [*scores, scores.min() - 1.0]:
            flagged = scores > threshold
            true_positives = np.sum(flagged & (labels == 1))
            tried.append(
                (np.mean(flagged == labels), 2 * true_positives / (np.sum(flagged) + np.sum(labels)), threshold)
            )
        accuracy, f1, _ = max(tried)
        row = Evaluation(labels, ["x"] * 21, [""] * 21, {"residual": scores}, "residual").rows()[0]
        assert (row.best_accuracy, row.best_f1) == pytest.approx((accuracy, f1))
        assert np.mean((scores > row.best_threshold) == labels) == row.best_accuracy


def test_best_threshold_may_flag_everything_or_nothing():
    labels = np.array([1, 1, 1, 1, 0])
    rows = Evaluation(labels, ["x"] * 5, [""] * 5, {"a": np.zeros(5), "b": np.arange(5.0)}, "a").rows()
    for row, scores in zip(rows[::2], (np.zeros(5), np.arange(5.0))):
        assert row.best_accuracy == 0.8
        assert np.all(scores > row.best_threshold)
    row = Evaluation(1 - labels, ["x"] * 5, [""] * 5, {"a": np.zeros(5)}, "a").rows()[0]
    assert (row.best_accuracy, row.best_f1, row.best_threshold) == (0.8, 0.0, 0.0)


def test_table_marks_the_optimistic_figures():
    table = format_table(some_evaluation())
    lines = table.splitlines()
    assert "acc.*" in lines[0]
    assert "* optimistic" in lines[-1]
    assert lines[2].startswith("discriminator_per_image  all abnormal")
    assert lines[3].startswith(" " * 25 + "flipped")
    assert max(len(line) for line in lines) <= 130
    assert "sens." not in format_table(some_evaluation(held_out=False))


def test_evaluation_keeps_float64_and_warns_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluation = some_evaluation()
        rows = evaluation.rows()
    assert list(evaluation.signals) == ["discriminator_per_image", "residual"]
    assert all(scores.dtype == np.float64 for scores in evaluation.signals.values())
    assert all(isinstance(row, Row) for row in rows)
    json.dumps([dataclasses.asdict(row) for row in rows], allow_nan=False)
    assert isinstance(auc([0, 1], [0, 1]), AUC)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.zeros(80, dtype=int)}, "no abnormal image"),
        ({"findings": ["NORMAL"]}, "findings must have one entry an image, got 1 for 80"),
        ({"paths": []}, "paths must have one entry"),
        ({"default": "memory_distance"}, r"default must be one of .*'residual'.* got 'memory_distance'"),
        ({"signals": {"discriminator_per_image": np.full(80, np.nan)}}, "signal 'discriminator_per_image' .* 80 NaN"),
        ({"signals": {"discriminator_per_image": np.zeros(3)}}, "'discriminator_per_image' .* got 3 for 80"),
        ({"holdout": {"residual": np.array([0.0, np.nan])}}, "held-out signal 'residual' .* 1 NaN"),
        ({"holdout": {"residual": np.array([])}}, "held-out signal 'residual' must be a row of one or more"),
        ({"false_positive_rate": 0.0}, "false_positive_rate must lie strictly between 0 and 1, got 0.0"),
    ],
)
def test_bad_evaluations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        some_evaluation(**changes)


def labelled(normal=6, abnormal=5):
    records = [data.Record(f"n{i}", "test", 0, "NORMAL") for i in range(normal)]
    records += [data.Record(f"a{i}", "test", 1, ("edema", "mass")[i % 2]) for i in range(abnormal)]
    pixels = np.random.default_rng(3).integers(0, 256, (len(records), 1, 48, 48), dtype=np.uint8)
    return data.ImageSet(torch.from_numpy(pixels), tuple(records))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.calibrated(tmp_path_factory.mktemp("model"))


def test_evaluate_measures_every_signal_with_the_models_thresholds(model):
    images = labelled()
    evaluation = evaluate(model, images, false_positive_rate=0.1)
    assert evaluation.default == model.signal and set(evaluation.signals) == set(model.signal_names)
    assert evaluation.kinds == ["edema", "mass"] and evaluation.false_positive_rate == 0.1
    raw = model.signals(images.batches())
    assert all(np.array_equal(evaluation.signals[name], raw[name]) for name in raw)
    assert evaluation.thresholds()[model.signal] == model.calibration.threshold(model.signal, 0.1)
    assert not evaluation.in_sample and IN_SAMPLE not in format_table(evaluation)
    assert next(iter(evaluate(model, images, signal="residual").signals)) == "residual"


def test_evaluate_without_held_out_images_has_no_threshold(tmp_path):
    evaluation = evaluate(tiny.calibrated(tmp_path, held=0), labelled())
    assert evaluation.holdout is None and evaluation.thresholds() == {} and not evaluation.in_sample


@pytest.mark.parametrize(
    ("held", "expected"),
    [(slice(0, 6), True), (slice(0, 4), True), (slice(0, 3), False), (None, False)],
    ids=["all evaluated normals", "most of them", "half of them and other images", "other images"],
)
def test_thresholds_from_evaluated_images_are_in_sample(tmp_path, held, expected):
    model, images = tiny.model(), labelled()
    others = tiny.images(3, 5)
    normal = images.batch([0, 1, 2, 3, 4, 5])
    model.calibrate(tiny.images(8, 1), others if held is None else torch.cat([normal[held], others]))
    evaluation = evaluate(model, images)
    assert evaluation.in_sample is expected
    assert (IN_SAMPLE in format_table(evaluation)) is expected


def test_scores_of_an_evaluation_are_in_the_order_of_the_records(model):
    images = labelled(2, 2)
    broken = data.Record("broken", "test", 1, "mass")
    images = dataclasses.replace(images, failures=(data.Failure("broken", "a reason"),))
    evaluation = evaluate(model, images)
    records = [images.records[0], broken, *images.records[1:]]
    scores = list(scores_of(model, images, evaluation, records))
    assert [score.path for score in scores] == ["n0", "broken", "n1", "a0", "a1"]
    assert (scores[1].label, scores[1].finding, scores[1].reason, scores[1].flagged) == (1, "mass", "a reason", None)
    threshold = evaluation.thresholds()[model.signal]
    for score in (scores[0], *scores[2:]):
        assert score.flagged == (score.signals[model.signal] > threshold) and not score.reason
    assert [score.path for score in scores_of(model, images, evaluation)] == ["n0", "n1", "a0", "a1", "broken"]


def test_labels_are_checked_before_anything_is_computed(model, monkeypatch):
    monkeypatch.setattr(Model, "signals", lambda *_, **__: pytest.fail("computed"))
    for labels, message in (
        ([0, 1, None, -1], "got 2 of 4 without one"),
        ([0, 0], "got 2 normal and 0 abnormal"),
        ([1], "got 0 normal and 1 abnormal"),
    ):
        with pytest.raises(ValueError, match=message):
            require_labels(labels)
    with pytest.raises(ValueError, match="got 0 normal and 5 abnormal"):
        evaluate(model, labelled(normal=0))
    with pytest.raises(ValueError, match="false_positive_rate"):
        evaluate(model, labelled(), false_positive_rate=2)
    with pytest.raises(ValueError, match="signal must be one of"):
        evaluate(model, labelled(), signal="pixel_knn")

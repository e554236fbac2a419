"""The table of a study: statistics over seeds, the t-test, the columns, the figure."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from simsid.study import STUDIES, Cell, Plan, Study, StudyImages, figure, table
from simsid.study.cells import Result

pytestmark = pytest.mark.usefixtures("small")

FULL, LESS = [0.80, 0.84, 0.82], [0.60, 0.61, 0.65]


def result(auc, signal="focal_residual", **changes):
    values = {"best_accuracy": 0.7, "best_f1": 0.75, "epoch_seconds": 2.0, "image_seconds": 0.01, "seconds": 9.0}
    signals = {signal: auc, "residual": 0.5}
    low, high = ({name: value + step for name, value in signals.items()} for step in (-0.1, 0.1))
    return Result(signal, signals, low, high, **{**values, **changes})


@pytest.fixture
def digits(small):
    return StudyImages(None, most=4)


def summaries(study, digits, **values):
    found = {label.replace("_", " "): [result(auc) for auc in aucs] for label, aucs in values.items()}
    return table.summarize(study, study.cells, found, digits)


STUDY = Study("title", (Cell("full model", paper=0.9), Cell("less", changes={"skip_levels": 0})))


def test_p_value_is_students_two_sample_t_test():
    a, b = np.array(FULL), np.array([0.7, 0.9])
    pooled = ((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2)
    t = (a.mean() - b.mean()) / math.sqrt(pooled * (1 / len(a) + 1 / len(b)))
    expected = 2 * stats.t.sf(abs(t), len(a) + len(b) - 2)
    assert table.p_value(a, b) == pytest.approx(expected, rel=1e-12)
    assert table.p_value(a, b) == pytest.approx(table.p_value(b, a), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "reference"),
    [([0.8], FULL), (FULL, [0.8]), (FULL, []), ([0.8, 0.8], [0.7, 0.7])],
    ids=["one value", "one reference", "no reference", "no variance"],
)
def test_p_value_that_cannot_be_computed_is_nan(values, reference):
    assert math.isnan(table.p_value(values, reference))


@pytest.mark.parametrize(("other", "verdict"), [(LESS, "worse"), ([0.9, 0.91, 0.92], "better"), (FULL, "")])
def test_a_row_is_compared_with_the_full_model_at_the_five_percent_level(digits, other, verdict):
    full, row = summaries(STUDY, digits, full_model=FULL, less=other)
    assert (full.verdict, row.verdict) == ("reference", verdict) and math.isnan(full.p_value)
    assert row.p_value == table.p_value(other, FULL)
    assert full.values["focal_residual"] == (pytest.approx(np.mean(FULL)), pytest.approx(np.std(FULL, ddof=1)))
    assert full.interval == (pytest.approx(0.7), pytest.approx(0.9))


def test_a_model_without_a_result_has_no_row_and_one_seed_has_no_deviation(digits):
    (row,) = summaries(STUDY, digits, less=[0.6])
    assert row.cell.label == "less" and row.verdict == "" and math.isnan(row.p_value)
    assert table.main_table([row], with_paper=False)[1][0][2] == "0.600"


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("patches", "P = 3"),
        ("topk", "k = 2"),
        ("components", "full model"),
        ("squid_components", "full model"),
        ("mixed", "simsid 100 %"),
        ("methods", "simsid"),
    ],
)
def test_the_reference_is_the_cell_at_the_defaults_of_the_data(digits, name, label):
    cells = [cell for cell in STUDIES[name].cells if cell.label != "P = 8"]  # does not divide the image
    rows = table.summarize(STUDIES[name], cells, {cell.label: [result(0.6)] for cell in cells}, digits)
    assert [row.cell.label for row in rows if row.verdict == "reference"] == [label]


def test_rows_without_their_reference_are_compared_with_nothing(digits):
    study = Study("title", (Cell("less", changes={"skip_levels": 0}), Cell("more")), reference="less")
    assert [row.verdict for row in summaries(study, digits, less=FULL, more=LESS)] == ["reference", "worse"]
    (row,) = summaries(dataclasses.replace(study, cells=study.cells[1:]), digits, more=LESS)
    assert row.verdict == "" and math.isnan(row.p_value)


def test_every_preset_of_contamination_is_compared_with_itself_on_normal_images(digits):
    study = STUDIES["contamination"]
    found = {cell.label: [result(0.6)] for cell in study.cells}
    rows = table.summarize(study, study.cells, found, digits)
    references = [row.cell.label for row in rows if row.verdict == "reference"]
    assert references == [f"{name} 100 %" for name in dict.fromkeys(cell.preset for cell in study.cells)]


def test_text_and_markdown_of_a_table(digits):
    rows = summaries(STUDY, digits, full_model=FULL, less=LESS)
    head, lines = table.main_table(rows, with_paper=True)
    assert table.as_text(head, lines).splitlines() == [
        "model       paper  signal          AUC            95 % interval   p      difference  accuracy*  F1*    "
        "s an epoch  ms an image",
        "----------  -----  --------------  -------------  --------------  -----  ----------  ---------  -----  "
        "----------  -----------",
        "full model  0.900  focal_residual  0.820 ± 0.020  0.700 to 0.900         reference   0.700      0.750  2.00"
        "        10.0",
        "less               focal_residual  0.620 ± 0.026  0.500 to 0.700  0.000  worse       0.700      0.750  2.00"
        "        10.0",
    ]
    assert table.as_markdown(*table.signal_table(rows)).splitlines() == [
        "| AUC of | focal_residual | residual |",
        "| --- | --- | --- |",
        "| full model | 0.820 ± 0.020 | 0.500 ± 0.000 |",
        "| less | 0.620 ± 0.026 | 0.500 ± 0.000 |",
    ]
    assert "paper" not in table.main_table(rows, with_paper=False)[0]
    assert "paper" not in table.main_table(rows[1:], with_paper=True)[0]


def test_notes_name_data_training_and_what_the_columns_are(digits):
    rows = summaries(STUDY, digits, full_model=FULL, less=LESS)
    said = "\n".join(table.notes(rows, digits, Plan(8, 6, "picked for 5 minutes from 0.1 s an iteration")))
    assert "DigitAnatomy: 4 training images; evaluated on 5 normal and 4 abnormal test images; 3 seeds." in said
    assert "width 8, 6 epochs, learning rate 0.0015 to 0.0001, not augmented, picked for 5 minutes" in said
    assert "optimistic" in said and "t-test" in said and "paper:" not in said
    assert "learning rate 0.0001 to 2e-05" in "\n".join(table.notes(rows, digits, Plan(32, 200)))


@pytest.mark.parametrize("name", ["components", "topk", "contamination", "speed"])
def test_figure_has_every_row(digits, name):
    study = STUDIES[name]
    found = {cell.label: [result(0.6), result(0.7)] for cell in study.cells}
    rows = table.summarize(study, study.cells, found, digits)
    drawn = figure.draw(study, rows, "title")
    axes = drawn.axes[0]
    assert len(drawn.axes) == (2 if study.measures == "seconds" else 1)
    if study.axis:
        assert axes.get_xlabel() == study.axis
        assert sum(len(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) > 2) >= len(rows) - 1
    else:
        assert [label.get_text() for label in axes.get_yticklabels()] == [row.cell.label for row in rows]

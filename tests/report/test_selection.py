"""Which images a report shows, and that pictures, table and pages agree about them."""

import numpy as np
import pytest
import samples
import tiny
import torch

from simsid import data
from simsid.evaluation import evaluate
from simsid.report import selection, write_report
from simsid.scoring import Score


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.calibrated(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def images():
    records = [data.Record(f"n{i}", "test", 0, "NORMAL") for i in range(6)]
    records += [data.Record(f"a{i}", "test", 1, ("edema", "mass")[i % 2]) for i in range(5)]
    pixels = np.random.default_rng(3).integers(0, 256, (len(records), 1, 48, 48), dtype=np.uint8)
    failures = (data.Failure("broken.png", "the file is cut short"),)
    return data.ImageSet(torch.from_numpy(pixels), tuple(records), failures)


@pytest.fixture(scope="module")
def evaluation(model, images):
    return evaluate(model, images)


def test_typical_images_are_of_every_kind_in_order_of_their_score(evaluation):
    indices = selection.typical_indices(evaluation, each=2)
    assert len(set(indices)) == len(indices)
    findings = [evaluation.findings[index] for index in indices]
    assert findings == ["NORMAL"] * 2 + ["edema"] * 2 + ["mass"] * findings.count("mass") and "mass" in findings
    values = evaluation.signals[evaluation.default][indices]
    assert values[0] <= values[1] and values[2] <= values[3]


def test_examples_show_the_images_with_the_scores_of_the_table(model, images, evaluation):
    indices = [7, 0, 3]
    examples = selection.examples_of_set(model, images, evaluation, indices)
    rows = {row.path: row for row in selection.evaluation_rows(model, images, evaluation)}
    assert len(examples) == 3
    for index, example in zip(indices, examples):
        record = images.records[index]
        assert (example.path, example.label, example.finding) == (record.path, record.label, record.finding)
        assert example.score == rows[example.path].score and 0 < example.score < 1
        assert np.array_equal(example.input, images.batch([index])[0, 0].numpy())
        assert example.reconstruction.shape == example.heat_map.shape == (48, 48)
        assert np.abs(example.reconstruction).max() <= 1 and example.heat_map.min() >= 0
        assert example.heat_name in model.map_names
    assert selection.examples_of_set(model, images, evaluation, []) == []


def test_rows_hold_every_image_and_every_unreadable_file(model, images, evaluation):
    rows = selection.evaluation_rows(model, images, evaluation, pages=["a1"])
    assert [row.path for row in rows] == [*(record.path for record in images.records), "broken.png"]
    assert [row.path for row in rows if row.page] == ["a1"]
    assert rows[-1].reason and rows[-1].score is rows[-1].percentile is rows[-1].flagged is None
    held = np.asarray(model.calibration.holdout[evaluation.default])
    for row in rows[:-1]:
        assert row.percentile == 100 * np.mean(held < row.signals[evaluation.default])
        assert row.flagged == (row.signals[evaluation.default] > evaluation.thresholds()[evaluation.default])
        assert set(row.signals) == set(model.signal_names)


def test_highest_scores_come_first_and_scores_without_image_are_left_out(model):
    pixels = np.linspace(-1, 1, 48 * 48, dtype=np.float32).reshape(48, 48)
    scores = [Score("gone.png", reason="gone"), *(Score(f"{i}.png", score=0.1 * i, image=pixels) for i in range(3))]
    examples = selection.examples_of_scores(model, scores)
    assert [example.path for example in examples] == ["2.png", "1.png", "0.png"]
    assert [example.score for example in examples] == [0.2, 0.1, 0.0]
    assert selection.examples_of_scores(model, scores[:1]) == []


def test_pages_are_written_for_the_pictured_images_that_the_table_links_to(model, images, evaluation, tmp_path):
    examples = selection.examples_of_set(model, images, evaluation, [0, 8])
    rows = selection.evaluation_rows(model, images, evaluation, pages=["n0", "a2"])
    report = tmp_path / "report.html"
    write_report(report, title="", evaluation=None, examples=examples, rows=rows, configuration={}, versions={})
    selection.write_film_pages(report, model, rows, examples)
    links = {link for link in samples.Page(report.read_text("utf-8")).links if link.startswith("films/")}
    assert len(links) == 2 and links == {f"films/{path.name}" for path in (tmp_path / "films").iterdir()}
    page = samples.Page((tmp_path / rows[0].page).read_text("utf-8"))
    assert [image["alt"].split()[0] for image in page.images] == [
        "input",
        "reconstruction",
        *(word for name in selection.distinct_maps(model) for word in (name, "color")),
    ]
    for name in model.signal_names:
        assert name in page.text and selection.descriptions(model)[name] in page.text
        standardized = model.calibration.standardize(name, np.array([rows[0].signals[name]]))[0]
        assert f"{standardized:+.2f}" in page.text

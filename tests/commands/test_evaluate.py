"""`simsid evaluate`: table, scores.csv, metrics.json, report, signals, and files that are missing or damaged."""

import json
import os

import pytest
import tiny

from simsid import Model


def labelled_list(folder, films, findings=("", "edema")):
    """Write a list of all films, every second one abnormal, and return its path."""
    listed = [[path, i % 2, findings[i % 2]] for i, path in enumerate(sorted(films.iterdir()))]
    return tiny.write_list(folder / "list.csv", ["path", "label", "finding"], listed)


def test_the_test_split_is_measured_with_every_signal(simsid, model, zhanglab, tmp_path):
    output = tmp_path / "out"
    done = simsid("evaluate", model, zhanglab, "-o", output, "--false-positive-rate", "0.1")
    assert done.code == 0, done.err
    assert all(name in done.out for name in Model.load(model).signal_names) and "report:" in done.out
    table = tiny.rows(output / "scores.csv")
    assert [row["label"] for row in table] == ["0"] * 3 + ["1"] * 3 and {row["reason"] for row in table} == {""}
    assert all("test" in row["path"] and float(row["residual"]) > 0 for row in table)
    document = json.loads((output / "metrics.json").read_text())
    assert document["split"] == "test" and document["rows"][0]["normal"] == 3 and document["in_sample"] is False
    assert {"false_positive_rate", "sensitivity", "auc"} <= document["rows"][0].keys()
    page = tiny.assert_self_contained(output / "report.html")
    assert "in-sample" not in done.out and "in-sample" not in page


def test_shift_adds_a_table_and_the_figures_of_every_signal(simsid, model, zhanglab, tmp_path):
    done = simsid("evaluate", model, zhanglab, "-o", "out", "--shift", "--signal", "residual")
    assert done.code == 0, done.err
    assert "residual: false positive rate and sensitivity" in done.out and "JPEG            10" in done.out
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["shift"]
    assert {row["signal"] for row in rows} == set(Model.load(model).signal_names)
    assert {row["shift"] for row in rows} == {"none", "gamma", "contrast", "blur", "affine", "JPEG"}


def test_score_and_evaluate_write_the_same_table(simsid, model, films, tmp_path):
    """One schema, one order, the same values bit for bit, and a reason for the file that is damaged."""
    labelled_list(tmp_path, films)
    tiny.damaged(tmp_path)
    with open(tmp_path / "list.csv", "a") as file:
        file.write("damaged.png,1,mass\n")
    with open(tmp_path / "list.csv", "a") as file:
        file.write(f"{tiny.film(tmp_path / 'last.png', 77)},0,\n")
    done = simsid("evaluate", model, "list.csv", "-o", "evaluated")
    assert done.code == 1 and "1 of 9 files could not be read (reasons in scores.csv)" in done.out
    assert simsid("score", model, "list.csv", "-o", "scored", "--pictures", "0").code == 1
    evaluated, scored = ((tmp_path / name / "scores.csv").read_bytes() for name in ("evaluated", "scored"))
    assert evaluated == scored
    table = tiny.rows(tmp_path / "evaluated" / "scores.csv")
    assert [bool(row["reason"]) for row in table] == [False] * 7 + [True, False]
    assert (table[7]["label"], table[7]["finding"], table[7]["score"], table[7]["flagged"]) == ("1", "mass", "", "")


def test_a_damaged_file_of_the_split_is_counted(simsid, model, tmp_path):
    folder = tiny.zhanglab(tmp_path / "chest_xray", train=1, val=2, test=1)
    tiny.damaged(folder / "val" / "NORMAL")
    done = simsid("evaluate", model, folder, "-o", "out", "--split", "val")
    assert done.code == 1 and "1 of 5 files could not be read" in done.out
    failed = [row for row in tiny.rows(tmp_path / "out" / "scores.csv") if row["reason"]]
    assert [os.path.basename(row["path"]) for row in failed] == ["damaged.png"] and failed[0]["label"] == "0"


def test_listed_files_that_do_not_exist_are_named(simsid, model, films, tmp_path):
    labelled_list(tmp_path, films)
    for line, message in (
        ("gone.png,1,\n", f"1 of 8 listed files do not exist, the first: {tmp_path / 'gone.png'}"),
        ("gone too.png,0,\n", f"2 of 9 listed files do not exist, the first: {tmp_path / 'gone.png'}"),
    ):
        with open(tmp_path / "list.csv", "a") as file:
            file.write(line)
        done = simsid("evaluate", model, "list.csv", "-o", "out")
        assert (done.code, done.err) == (2, f"simsid: {message}\n") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["residual", "memory_distance"])
def test_another_signal_comes_first_and_flags(simsid, model, films, tmp_path, name):
    labelled_list(tmp_path, films)
    done = simsid("evaluate", model, "list.csv", "-o", "out", "--signal", name, "--false-positive-rate", "0.5")
    assert done.code == 0, done.err
    assert done.out.splitlines()[2].startswith(name)
    threshold = Model.load(model).calibration.threshold(name, 0.5)
    for row in tiny.rows(tmp_path / "out" / "scores.csv"):
        assert int(row["flagged"]) == int(float(row[name]) > threshold)
    document = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert document["rows"][0]["signal"] == name and document["rows"][0]["threshold"] == threshold


def test_an_evaluation_on_the_images_that_set_the_threshold_is_marked_in_sample(simsid, model, zhanglab, tmp_path):
    Model.load(model).save(tmp_path / "model")
    assert simsid("calibrate", "model", zhanglab / "test" / "NORMAL", "--local").code == 0
    done = simsid("evaluate", "model", zhanglab)
    assert "sens., spec. and the false positive rate are in-sample" in done.out
    output = tmp_path / "model" / "evaluation"
    assert json.loads((output / "metrics.json").read_text())["in_sample"] is True
    assert "in-sample" in tiny.assert_self_contained(output / "report.html")
    # Other images are not; and the residual's threshold has the same origin.
    assert "in-sample" not in simsid("evaluate", "model", zhanglab, "--split", "val").out
    assert "in-sample" in simsid("evaluate", "model", zhanglab, "--signal", "residual").out


def test_a_trained_model_is_in_sample_on_its_validation_images_only(simsid, zhanglab, tmp_path):
    assert simsid("train", zhanglab, "-o", "run", *tiny.TRAINING, "--val-share", "0.3").code == 0
    assert "in-sample" in simsid("evaluate", "run", zhanglab, "--split", "val").out
    assert "in-sample" not in simsid("evaluate", "run", zhanglab, "--split", "test").out


def test_excluded_files_are_not_evaluated(simsid, model, zhanglab, tmp_path):
    done = simsid("evaluate", model, zhanglab, "-o", "out", "--exclude", "*/IM-0300-*", "person302*")
    assert done.code == 0
    names = [os.path.basename(row["path"]) for row in tiny.rows(tmp_path / "out" / "scores.csv")]
    assert len(names) == 4 and not [name for name in names if name.startswith(("IM-0300", "person302"))]


def test_a_report_that_cannot_be_written_keeps_the_figures(simsid, model, zhanglab, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("simsid.report.write_report", fail)
    done = simsid("evaluate", model, zhanglab, "-o", "figures")
    assert done.code == 1 and "AUC" in done.out
    assert "simsid: the figures are in figures/metrics.json, but writing the report failed" in done.err
    assert len(tiny.rows(tmp_path / "figures" / "scores.csv")) == 6

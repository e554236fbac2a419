"""`simsid score`: a row for every file, each decoded once, pictures, signals, resumption and the warning of a shift."""

import builtins
import itertools
import os
from collections import Counter

import numpy as np
import pytest
import tiny

from simsid import Model, data
from simsid.scoring import archive, columns


def copied(films, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for path in films.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def opened(monkeypatch):
    """Count how often each PNG is opened for reading."""
    counts, real = Counter(), builtins.open

    def counting(file, mode="r", *arguments, **options):
        if isinstance(file, (str, os.PathLike)) and os.fspath(file).endswith(".png") and "r" in mode:
            counts[os.path.basename(file)] += 1
        return real(file, mode, *arguments, **options)

    monkeypatch.setattr(builtins, "open", counting)
    return counts


def stop_after(monkeypatch, count):
    """Make scoring receive Ctrl-C after so many files."""
    real = archive.score_files

    def stops(*arguments, **options):
        yield from itertools.islice(real(*arguments, **options), count)
        raise KeyboardInterrupt

    monkeypatch.setattr(archive, "score_files", stops)


def test_every_file_has_a_row_and_unreadable_ones_a_reason(simsid, model, tmp_path):
    folder = tmp_path / "in, put"
    good = [tiny.film(folder / "a, b" / f"film {i}.png", i) for i in range(3)]
    good.append(tiny.film(os.fsdecode(os.path.join(os.fsencode(folder), b"caf\xe9.png")), 8))
    bad = [tiny.damaged(folder), tiny.damaged(folder, os.fsdecode(b"\xff\xfe.png"))]
    (folder / "notes.txt").write_text("not an image")
    output = tmp_path / "out put"
    # By the papers' score, which lies within 0..1 for noise too; an error far from normal ends at 1.
    signal = "discriminator_per_image"
    done = simsid("score", model, folder, "-o", output, "--signal", signal)
    assert done.code == 1, done.err
    assert "4 of 6 files scored, 2 failed (reasons in scores.csv)" in done.out
    table = tiny.rows(output / "scores.csv")
    assert [row["path"] for row in table] == [record.path for record in data.Radiographs(folder).records]
    assert {row["path"] for row in table} == {str(path) for path in (*good, *bad)}
    loaded = Model.load(model)
    assert list(table[0]) == columns(loaded.signal_names)
    assert list(table[0])[:5] == ["path", "label", "finding", "score", "flagged"] and list(table[0])[-1] == "reason"
    for row in table:
        if row["path"] in bad:
            assert row["reason"] and not row["score"] and not row["flagged"] and not row["residual"]
        else:
            assert 0 < float(row["score"]) < 1 and row["flagged"] in "01" and not row["reason"]
            value = float(row[signal])
            assert float(row["score"]) == loaded.calibration.probability(signal, np.array([value]))[0]
    tiny.assert_self_contained(output / "report.html")
    assert sorted(path.name for path in output.iterdir()) == [".scoring.lock", "films", "report.html", "scores.csv"]
    # The table is a list of images itself, with names that are not text.
    again = simsid(
        "score", model, output / "scores.csv", "-o", tmp_path / "again", "--pictures", "0", "--signal", signal
    )
    assert again.code == 1 and tiny.rows(tmp_path / "again" / "scores.csv") == table


def test_exit_statuses_tell_all_some_and_none_and_old_reports_are_removed(simsid, model, films, tmp_path):
    output, folder = tmp_path / "out", tmp_path / "data"
    assert simsid("score", model, films, "-o", output, "--pictures", "2").code == 0
    assert len(list((output / "films").iterdir())) == 2
    (output / "films" / "notes.html").write_text("a user's own")
    folder.mkdir()
    for i in range(2):
        tiny.damaged(folder, f"{i}.png")
    done = simsid("score", model, folder, "-o", output)
    assert done.code == 2 and "0 of 2 files scored" in done.out
    assert len(tiny.rows(output / "scores.csv")) == 2 and not (output / "report.html").exists()
    assert [path.name for path in (output / "films").iterdir()] == ["notes.html"]
    image = sorted(films.iterdir())[0]
    tiny.write_list(tmp_path / "list.csv", ["path"], [["nowhere.png"], [image]])
    assert simsid("score", model, tmp_path / "list.csv", "-o", output, "--batch-size", "1").code == 1
    assert [row["path"] for row in tiny.rows(output / "scores.csv")] == [str(tmp_path / "nowhere.png"), str(image)]


def test_one_image_is_scored(simsid, model, films, tmp_path):
    image = sorted(films.iterdir())[0]
    done = simsid("score", model, image, "-o", "out")
    assert done.code == 0 and "1 of 1 files scored" in done.out
    (row,) = tiny.rows(tmp_path / "out" / "scores.csv")
    assert row["path"] == str(image)
    assert image.name in tiny.assert_self_contained(tmp_path / "out" / "report.html")


def test_labels_and_findings_of_a_list_stand_in_the_table(simsid, model, films, tmp_path):
    paths = sorted(films.iterdir())
    listed = [[paths[0], 0, ""], [paths[1], 1, "edema"], ["nowhere.png", 1, "mass"], [paths[2], "", ""]]
    tiny.write_list(tmp_path / "list.csv", ["path", "label", "finding"], listed)
    assert simsid("score", model, "list.csv", "-o", "out", "--pictures", "0").code == 1
    table = tiny.rows(tmp_path / "out" / "scores.csv")
    assert [(row["label"], row["finding"]) for row in table] == [("0", ""), ("1", "edema"), ("1", "mass"), ("", "")]


def test_each_file_is_decoded_once_pictures_included(simsid, model, films, tmp_path, opened):
    assert simsid("score", model, films, "-o", "out", "--pictures", "5", "--batch-size", "3").code == 0
    assert dict(opened) == {path.name: 1 for path in films.iterdir()}
    text = tiny.assert_self_contained(tmp_path / "out" / "report.html")
    assert text.count('id="example-') == 5


def test_a_resumed_scoring_pictures_the_same_images_and_reads_again_only_those(
    simsid, model, films, tmp_path, monkeypatch, opened
):
    assert simsid("score", model, films, "-o", "at once", "--pictures", "3").code == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert simsid("score", model, films, "-o", "out", "--pictures", "3").code == 130
    opened.clear()
    assert simsid("score", model, films, "-o", "out", "--pictures", "3").code == 0
    names = sorted(path.name for path in films.iterdir())
    rows = sorted(tiny.rows(tmp_path / "out" / "scores.csv"), key=lambda row: -float(row["standardized_residual"]))
    pictured = {os.path.basename(row["path"]) for row in rows[:3]}
    assert dict(opened) == dict.fromkeys(pictured | {names[6]}, 1)
    pages = [(tmp_path / folder / "report.html").read_bytes() for folder in ("at once", "out")]
    assert pages[0] == pages[1]


def test_an_interrupted_scoring_leaves_earlier_results_and_resumes(simsid, model, films, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        done = simsid("score", model, films, "-o", output)
        assert (done.code, done.err) == (130, "stopped after 3 files; the same command resumes\n")
        assert not (output / "scores.csv").exists()
        (output / "scores.csv").write_text("earlier")
        (output / "report.html").write_text("earlier")
        done = simsid("score", model, films, "-o", output)
        assert done.code == 130 and "stopped after 6 files" in done.err
        assert done.out == "resumed after 3 files that were done\n"
        assert (output / "scores.csv").read_text() == (output / "report.html").read_text() == "earlier"
    done = simsid("score", model, films, "-o", output)
    assert done.code == 0
    assert done.out.startswith("resumed after 6 files that were done\n7 of 7 files scored\n")
    tiny.assert_self_contained(output / "report.html")
    assert simsid("score", model, films, "-o", tmp_path / "at once").code == 0
    assert (output / "scores.csv").read_bytes() == (tmp_path / "at once" / "scores.csv").read_bytes()


def test_a_report_that_cannot_be_written_keeps_the_table_and_the_next_start_writes_it(
    simsid, model, films, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("simsid.report.write_report", fail)
        done = simsid("score", model, films, "-o", "out")
    assert done.code == 1 and "simsid: the scores are in out/scores.csv, but" in done.err and "No space" in done.err
    assert len(tiny.rows(tmp_path / "out" / "scores.csv")) == 7
    done = simsid("score", model, films, "-o", "out")
    assert done.code == 0 and "resumed after 7 files" in done.out
    tiny.assert_self_contained(tmp_path / "out" / "report.html")


@pytest.mark.parametrize("name", ["residual", "memory_distance"])
def test_another_signal_scores_flags_and_pictures(simsid, model, films, tmp_path, name):
    options = ("--signal", name, "--false-positive-rate", "0.5", "--pictures", "1")
    done = simsid("score", model, films, "-o", "out", *options)
    assert done.code == 0, done.err
    calibration = Model.load(model).calibration
    threshold = calibration.threshold(name, 0.5)
    table = tiny.rows(tmp_path / "out" / "scores.csv")
    flags = [int(float(row[name]) > threshold) for row in table]
    assert [int(row["flagged"]) for row in table] == flags
    assert f"{sum(flags)} flagged: above the threshold that 50 % of 19 held-out normal images may exceed" in done.out
    for row in table:
        assert float(row["score"]) == calibration.probability(name, np.array([float(row[name])]))[0]
    highest = max(table, key=lambda row: float(row[name]))
    text = tiny.assert_self_contained(tmp_path / "out" / "report.html")
    assert text.count('id="example-') == 1 and f"with the highest {name} are shown" in text
    (page,) = (tmp_path / "out" / "films").iterdir()
    assert os.path.basename(highest["path"]) in page.read_text("utf-8")


def test_excluded_files_are_not_scored(simsid, model, films, tmp_path):
    copied(films, tmp_path / "data"), copied(films, tmp_path / "data" / "masks")
    assert simsid("score", model, "data", "-o", "out", "--pictures", "0").code == 0
    assert len(tiny.rows(tmp_path / "out" / "scores.csv")) == 14
    assert simsid("score", model, "data", "-o", "out", "--pictures", "0", "--exclude", "masks/*", "*6, 0.png").code == 0
    names = [os.path.relpath(row["path"], tmp_path) for row in tiny.rows(tmp_path / "out" / "scores.csv")]
    assert names == [f"data/film {i}, 0.png" for i in range(6)]


def test_a_model_without_held_out_images_flags_nothing(simsid, films, tmp_path):
    tiny.calibrated(tmp_path / "model", held=0)
    done = simsid("score", "model", films, "-o", "out", "--pictures", "0")
    assert done.code == 0 and "no threshold: the model was calibrated without held-out normal images" in done.out
    assert {row["flagged"] for row in tiny.rows(tmp_path / "out" / "scores.csv")} == {""}


def test_a_model_without_calibration_is_refused_with_the_remedy(simsid, films, tmp_path):
    tiny.model().save(tmp_path / "model")
    done = simsid("score", "model", films, "-o", "out")
    assert done.code == 2 and "run simsid calibrate model DATA" in done.err
    assert not (tmp_path / "out").exists()


def gradients(folder, count, seed, exponent=1.0):
    """Write images with a smooth gradient, some noise and another gamma, as of another scanner."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:1:48j, 0:1:48j]
    for i in range(count):
        shades = generator.uniform(0.3, 0.7) * rows + generator.uniform(0.1, 0.3) * columns
        pixels = 255 * (shades + generator.normal(0, 0.02, shades.shape)).clip(0, 1) ** exponent
        tiny.write_png(folder / f"{i:02d}.png", pixels.astype(np.uint8))
    return folder


@pytest.mark.parametrize("seed", range(3))
def test_a_shifted_folder_is_warned_of_and_an_unshifted_one_is_not(simsid, tmp_path, seed):
    train = gradients(tmp_path / "train", 60, seed)
    options = ("--preset", "pixel_pca", "--image-size", "16", "--components", "4", "--val-share", "0.5", "-o", "model")
    assert simsid("train", train, *options).code == 0
    done = simsid("score", "model", gradients(tmp_path / "same", 40, seed + 100), "-o", "same", "--pictures", "1")
    assert done.code == 0 and "shifted" not in done.err
    assert "the scores have shifted" not in (tmp_path / "same" / "report.html").read_text("utf-8")
    other = gradients(tmp_path / "other", 40, seed + 200, exponent=3.0)
    done = simsid("score", "model", other, "-o", "shifted", "--pictures", "1")
    assert done.code == 0
    (note,) = [line for line in done.err.splitlines() if "shifted" in line]
    assert note.startswith("simsid: note: the scores have shifted: 100% of 40 images lie")
    assert "(simsid adapt model FOLDER -o NEW)" in note and note.endswith(
        "(simsid calibrate model FOLDER --local -o NEW)"
    )
    assert "the scores have shifted" in (tmp_path / "shifted" / "report.html").read_text("utf-8")
    # The remedy that the warning names silences it.
    assert simsid("calibrate", "model", other, "--local").code == 0
    more = gradients(tmp_path / "more", 40, seed + 300, exponent=3.0)
    assert "shifted" not in simsid("score", "model", more, "-o", "recalibrated", "--pictures", "0").err

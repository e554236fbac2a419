"""`simsid report`: the page of a finished run with what its memories hold, and what it refuses."""

import pathlib
import shutil
import sys

import pytest
import tiny

sys.path.append(str(pathlib.Path(__file__).parents[1] / "report"))
from samples import Page

from simsid import checkpoint, data
from simsid.models import PixelKNN


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.run(tmp_path_factory.mktemp("run") / "first")


DIGITS = data.DigitAnatomy


def copied(run, folder):
    """Copy a run; its images stay where they are."""
    shutil.copytree(run, folder)
    return folder


def test_page_shows_every_memory_of_the_run_and_its_validation_images(simsid, run, tmp_path):
    before = sorted(path.name for path in run.iterdir())
    done = simsid("report", run, "-o", tmp_path / "out", "--images", 8)
    assert (done.code, done.err) == (0, ""), done.err
    assert done.out == f"report: {tmp_path / 'out' / 'report.html'}\n"
    text = tiny.assert_self_contained(tmp_path / "out" / "report.html")
    page = Page(text)
    for name in ("in-painting memory", "decoder memory 1", "decoder memory 2"):
        assert f"{name} 4 locations with 6 items (learned items)" in page.text
    assert page.text.count("are dead : no look-up kept them.") == 3
    assert page.text.count("latest features, as a queue holds them") == 1
    drawn = [image["alt"] for image in page.images]
    assert sum("t-SNE of" in text for text in drawn) == 4
    assert sum("item of rank" in text for text in drawn) == 3 * 4
    assert "AUC by finding" in page.text and "optimistic" in page.text
    assert sorted(path.name for path in run.iterdir()) == before


def test_page_lies_in_the_run_and_shows_another_run_beside_it(simsid, run, tmp_path):
    queue = tiny.run(tmp_path / "queue", memory="queue")
    done = simsid("report", queue, "--beside", run)
    assert done.code == 0, done.err
    page = Page((queue / "memory" / "report.html").read_text("utf-8"))
    assert "(queue of features)" in page.text and "first: learned items" in page.text


def test_unfinished_run_without_abnormal_images_has_a_note_and_no_figures(simsid, run, tmp_path):
    folder = copied(run, tmp_path / "run")
    checkpoint.write_json(folder / "last.json", {"progress": {"finished": False}})
    rows = [row for row in tiny.rows(folder / "manifest.csv") if row["label"] == "0"]
    tiny.write_list(folder / "manifest.csv", list(rows[0]), [list(row.values()) for row in rows])
    done = simsid("report", folder)
    assert (
        done.code == 0 and f"simsid: note: {folder} is not finished; the page shows its best model so far" in done.err
    )
    page = Page((folder / "memory" / "report.html").read_text("utf-8"))
    assert "no labeled validation images of both classes" in page.text and "decoder memory 2" in page.text


def test_images_of_a_demo_are_drawn_again(simsid, tmp_path, monkeypatch):
    drawn = []

    def digits(**options):
        drawn.append(options)
        return DIGITS(**options, val=2, test_normal=1, test_anomalous=4)

    monkeypatch.setattr(data, "DigitAnatomy", digits)
    model = tiny.model(image_size=96, patches=3, levels=3, decoder_memories=0)
    model.calibrate(tiny.noise(8, 96), tiny.noise(20, 96))
    model.save(tmp_path / "demo")
    request = {"command": "demo", "images": 12, "seed": 5, "mnist": False}
    checkpoint.write_json(tmp_path / "demo" / "run.json", request)
    done = simsid("report", tmp_path / "demo")
    assert done.code == 0 and drawn == [{"seed": 5, "train": 12}], done.err
    checkpoint.write_json(tmp_path / "demo" / "run.json", {**request, "mnist": True})
    assert "trained on MNIST's files" in simsid("report", tmp_path / "demo").err


def test_model_without_memory_says_so(simsid, run, tmp_path):
    folder = copied(run, tmp_path / "run")
    model = PixelKNN(image_size=48).fit(tiny.images(8))
    (folder / "model.json").unlink()  # a model of another kind is not replaced
    model.save(folder)
    assert simsid("report", folder).code == 0
    page = Page((folder / "memory" / "report.html").read_text("utf-8"))
    assert "This model has no memory: there are no items to show." in page.text
    refused = simsid("report", run, "--beside", folder)
    assert refused.code == 2 and f"{folder} has no memory to show beside that of {run}" in refused.err
    assert not (run / "memory").exists()


def test_folder_that_is_no_run_missing_images_and_too_few_are_refused(simsid, run, tmp_path):
    (tmp_path / "model").mkdir()
    done = simsid("report", tmp_path / "model")
    assert done.code == 2 and f"{tmp_path / 'model'} is not a run: it has no run.json" in done.err
    done = simsid("report", "nope")
    assert (done.code, done.err) == (
        2,
        "simsid: nope does not exist; give a run folder, which `simsid train` writes\n",
    )
    done = simsid("report", run, "--beside", "zhanglab")
    assert done.code == 2 and "zhanglab comes with simsid, without a run and its images" in done.err
    assert "simsid score zhanglab FOLDER -o DIR" in done.err and done.err.count("\n") == 1
    folder = copied(run, tmp_path / "run")
    row = dict(tiny.rows(folder / "manifest.csv")[0], path=str(tmp_path / "gone.png"))
    tiny.write_list(folder / "manifest.csv", list(row), [list(row.values())])
    done = simsid("report", folder)
    assert done.code == 2 and f"1 of 1 images of {folder / 'manifest.csv'} do not exist" in done.err
    assert simsid("report", folder, "--images", 7).code == 2
    assert not (folder / "memory").exists()

"""`simsid explain`: what it writes, and what it refuses."""

import os
import types

import numpy as np
import pytest
import tiny
from PIL import Image

from simsid.commands import main as cli
from simsid.models import PixelKNN


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.calibrated(folder)
    return folder


@pytest.fixture
def explain(capsys, tmp_path):
    """Run `simsid explain`; returns exit status, output and errors."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main(["explain", *map(str, arguments), "--device", "cpu", "--workers", "1"])
        printed = capsys.readouterr()
        return types.SimpleNamespace(code=stop.value.code, out=printed.out, err=printed.err)

    return run


def test_every_image_gets_picture_and_values_and_unreadable_files_a_reason(explain, model, tmp_path):
    for folder in ("one", "two"):
        tiny.film(tmp_path / "in" / folder / "scan.png", len(folder))
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    before = {path: path.read_bytes() for path in (tmp_path / "in").rglob("*.png")}
    done = explain(model, tmp_path / "in", "-o", tmp_path / "out", "--signal", "residual", "--limit", "0.5")
    assert done.code == 1, done.err
    assert "2 of 3 maps of residual written" in done.out and "1 failed (reasons in explain.csv)" in done.out
    rows = tiny.rows(tmp_path / "out" / "explain.csv")
    assert [os.path.basename(row["path"]) for row in rows] == ["broken.png", "scan.png", "scan.png"]
    assert rows[0]["reason"] and not rows[0]["overlay"]
    for row in rows[1:]:
        heat = np.load(tmp_path / "out" / row["map"])
        assert heat.shape == (40, 52) == (int(row["height"]), int(row["width"]))
        assert divmod(int(heat.argmax()), 52) == (int(row["peak_row"]), int(row["peak_column"]))
        assert float(row["peak"]) == pytest.approx(heat.max()) and not row["reason"]
        with Image.open(tmp_path / "out" / row["overlay"]) as picture:
            pixels = np.asarray(picture)
        assert (
            pixels.shape[2] == 3
            and pixels.shape[0] > 40
            and len(np.unique(pixels[:40, :52].reshape(-1, 3), axis=0)) > 50
        )
    assert len(list((tmp_path / "out").iterdir())) == 5, "nothing temporary stays"
    assert before == {path: path.read_bytes() for path in (tmp_path / "in").rglob("*.png")}
    # Again into the same folder: the same names.
    assert explain(model, tmp_path / "in", "-o", tmp_path / "out", "--signal", "memory_distance").code == 1
    assert len(list((tmp_path / "out").iterdir())) == 5


def test_map_of_the_models_own_signal_is_the_default(explain, model, tmp_path):
    path = tiny.film(tmp_path / "in" / "scan.png")
    done = explain(model, path, "-o", tmp_path / "out")
    assert done.code == 0 and "1 of 1 maps of standardized_residual written" in done.out


def test_no_readable_file_is_status_2(explain, model, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    assert explain(model, tmp_path / "in", "-o", tmp_path / "out").code == 2


@pytest.mark.parametrize("inside", ["", "maps", "a/../maps"])
def test_output_among_the_images_is_refused(explain, model, tmp_path, inside):
    tiny.film(tmp_path / "in" / "scan.png")
    done = explain(model, tmp_path / "in", "-o", tmp_path / "in" / inside)
    assert done.code == 2 and "the output must lie outside the folder of images" in done.err
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["scan.png"]


def test_unknown_signal_lists_the_choices_and_writes_nothing(explain, model, tmp_path):
    path = tiny.film(tmp_path / "in" / "scan.png")
    done = explain(model, path, "-o", tmp_path / "out", "--signal", "pixel_knn")
    assert (
        done.code == 2 and "signal must be one of discriminator_per_image, discriminator_running, residual" in done.err
    )
    assert not (tmp_path / "out").exists()


def test_model_without_maps_is_refused(explain, tmp_path):
    PixelKNN(image_size=48).fit(tiny.images(4)).save(tmp_path / "model")
    path = tiny.film(tmp_path / "in" / "scan.png")
    done = explain(tmp_path / "model", path, "-o", tmp_path / "out")
    assert done.code == 2 and "none of the model's signals has a map: pixel_knn" in done.err

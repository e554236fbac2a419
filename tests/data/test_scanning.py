"""The report on a folder."""

import json
import types

import numpy as np
import pytest
from sample_files import ramp, save, write_dicom

from simsid.data import Failure, read_image, scan, scanning


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "a.png", ramp())
    save(tmp_path / "sub/b.jpg", ramp())
    save(tmp_path / "sub/c.png", ramp(30, 40, 65535, np.uint16))
    write_dicom(tmp_path / "IM0001", ramp(30, 40, 4095, np.uint16), BitsStored=12, HighBit=11)
    window = {"WindowCenter": 2000, "WindowWidth": 1000}
    write_dicom(tmp_path / "IM0002", ramp(30, 40, 4095, np.uint16), BitsStored=12, HighBit=11, **window)
    write_dicom(tmp_path / "IM0003", ramp(), NumberOfFrames=4)
    (tmp_path / "sub/cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:90])
    (tmp_path / "README.md").write_text("text")
    return tmp_path


def test_counts_and_reasons(folder):
    report = scan(folder)
    assert report.readable == 5
    assert report.formats == {"DICOM": 2, "PNG": 2, "JPEG": 1}
    assert report.sizes == {(40, 30): 3, (20, 12): 2}
    assert report.bits == {8: 2, 12: 2, 16: 1}
    assert report.without_range == 2
    assert [failure.path for failure in report.failures] == [str(folder / "IM0003"), str(folder / "sub/cut.png")]
    assert "multi-frame" in report.failures[0].reason
    assert all(isinstance(failure, Failure) for failure in report.failures)
    assert report.ignored == (str(folder / "README.md"),)


def test_text_names_every_count_and_every_rejected_file(folder):
    text = str(scan(folder, workers=1))
    assert text.splitlines()[0] == f"{folder}: 5 readable images, 2 rejected"
    for part in (
        "  DICOM  2",
        "  40 x 30  3",
        "  12  2",
        "2 deeper than 8 bits without a display range",
        "  IM0003: the DICOM image is multi-frame",
        "  sub/cut.png: the PNG data cannot be decoded",
        "not images, ignored: README.md",
    ):
        assert part in text, text


def test_dict_is_json(folder):
    loaded = json.loads(json.dumps(scan(folder).as_dict()))
    assert loaded["formats"] == {"DICOM": 2, "PNG": 2, "JPEG": 1}
    assert loaded["sizes"] == {"40x30": 3, "20x12": 2}
    assert loaded["bits"] == {"8": 2, "12": 2, "16": 1}
    assert loaded["rejected"] == 2
    assert loaded["failures"][1]["path"].endswith("cut.png")


def test_many_sizes_are_cut_short(tmp_path):
    for i in range(2, 16):
        save(tmp_path / f"{i}.png", ramp(i, 5))
    text = str(scan(tmp_path))
    assert "  and 4 more" in text
    assert len(scan(tmp_path).sizes) == 14


def test_images_of_two_gray_values_are_listed_as_masks(tmp_path):
    mask = np.where(ramp() > 100, 255, 0).astype(np.uint8)
    save(tmp_path / "a.png", ramp())
    save(tmp_path / "masks/a.png", mask)
    save(tmp_path / "masks/deep.png", mask.astype(np.uint16) * 100)
    report = scan(tmp_path)
    assert report.masks == (str(tmp_path / "masks/a.png"), str(tmp_path / "masks/deep.png"))
    assert "two gray values only, probably masks (leave them out with exclude): masks/a.png, masks/deep.png" in str(
        report
    )
    assert report.as_dict()["masks"] == list(report.masks)
    assert scan(tmp_path, exclude="masks").masks == ()
    assert "masks" not in str(scan(tmp_path, exclude="masks"))


def test_images_for_processing_are_listed(folder, monkeypatch):
    def read(file, **options):
        image = read_image(file, **options)
        # The attribute is that of the reader, which sets it from Presentation Intent Type.
        return types.SimpleNamespace(**{**vars(image), "for_processing": file.name.endswith("IM0002")})

    monkeypatch.setattr(scanning, "read_image", read)
    report = scan(folder)
    assert report.for_processing == (str(folder / "IM0002"),)
    assert "stored FOR PROCESSING, not for display: IM0002" in str(report)
    assert report.as_dict()["for_processing"] == [str(folder / "IM0002")]


def test_control_characters_in_names_do_not_reach_the_terminal(tmp_path):
    save(tmp_path / "a.png", ramp())
    (tmp_path / "b\r\x1b[2J.png").write_bytes(b"")
    (tmp_path / "c\n.txt").write_bytes(b"text")
    text = str(scan(tmp_path))
    assert r"  b\r\x1b[2J.png: the file is empty" in text and r"ignored: c\n.txt" in text
    assert all(line.isprintable() for line in text.splitlines()) and "\r" not in text


def test_scan_of_a_csv_list_and_of_an_empty_folder(folder):
    (folder / "list.csv").write_text("path\na.png\nabsent.png\n")
    report = scan(folder / "list.csv")
    assert report.formats == {"PNG": 1}
    assert "No such file" in report.failures[0].reason
    assert str(folder / "absent.png") in str(report)
    (folder / "empty").mkdir()
    report = scan(folder / "empty")
    assert (report.readable, report.failures, report.ignored) == (0, (), ())
    assert "0 readable images" in str(report)
    with pytest.raises(ValueError, match="does not exist"):
        scan(folder / "absent")


def test_scan_shows_progress_and_limits_pixels(folder, capfd):
    report = scan(folder, progress=True, max_pixels=20 * 12)
    assert "scanning" in capfd.readouterr().err
    assert report.readable == 2
    assert sum("more than" in failure.reason for failure in report.failures) == 3

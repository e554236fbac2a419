"""The page of one radiograph, and the rules for its name."""

import dataclasses
import os
import re

import numpy as np
import pytest
import samples
from samples import HOSTILE, Page

from simsid.report import FilmRow, HeatMap, page_name, remove_films, write_film

DESCRIPTIONS = {"residual": f"mean squared difference {HOSTILE}"}


def test_page_shows_score_signals_maps_and_provenance(tmp_path):
    row, example = samples.rows(pages=1)[0], samples.examples(1)[0]
    maps = [
        HeatMap("local_residual", example.heat_map, f"absolute difference {HOSTILE}", limit=2.5),
        HeatMap("memory_distance", np.zeros_like(example.heat_map)),
    ]
    path = write_film(
        tmp_path / "report.html",
        row,
        example,
        maps=maps,
        standardized={"residual": 2.345, "local_residual": -0.5},
        descriptions=DESCRIPTIONS,
    )
    assert path == tmp_path / row.page
    text = path.read_text("utf-8")
    page = Page(text)
    assert [image["alt"].split()[0] for image in page.images] == [
        "input",
        "reconstruction",
        "local_residual",
        "color",
        "memory_distance",
        "color",
    ]
    assert f" {row.score:.4f} " in page.text and f" {row.percentile:.1f} " in page.text and "≥ 2.5 " in page.text
    for name, value in row.signals.items():
        assert f"{value:.5g}" in page.text, name
    assert "+2.35" in page.text and "-0.50" in page.text
    assert "center 2048, width 4096" in page.text and row.path in page.text
    assert page.links == ["../report.html"]
    # Finding, unit, description, path, name and value of a detail; the title has what follows the last slash.
    assert page.text.count(HOSTILE) == 6 and "<script" not in text and "script-src 'none'" in text


def test_page_of_a_model_without_maps_shows_the_input(tmp_path):
    row = FilmRow("a.png", page=page_name("a.png"))
    example = dataclasses.replace(samples.examples(1)[0], reconstruction=None, heat_map=None)
    page = Page(write_film(tmp_path / "report.html", row, example).read_text("utf-8"))
    assert len(page.images) == 1
    assert "no threshold" in page.text and "no held-out normal images" in page.text and "Signals" not in page.text


def test_failed_write_keeps_the_old_page_and_leaves_nothing_beside_it(tmp_path, monkeypatch):
    row, example = samples.rows(pages=1)[0], samples.examples(1)[0]
    path = write_film(tmp_path / "report.html", row, example)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space"):
        write_film(tmp_path / "report.html", row, example, descriptions=DESCRIPTIONS)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("path", [HOSTILE, "", "../../etc/passwd", "é/ÿ.dcm", "\udcff.png", "a" * 300, "CON.png", ".."])
def test_page_name_is_safe_and_the_same_for_the_same_path(path):
    name = page_name(path)
    assert re.fullmatch(r"films/[A-Za-z0-9-]{1,40}-[0-9a-f]{12}\.html", name) and name == page_name(path)
    assert FilmRow(path, page=name).page == name


def test_files_of_one_name_in_two_folders_have_two_pages():
    assert page_name("a/view1.dcm") != page_name("b/view1.dcm")
    assert page_name("a/view1.dcm").startswith("films/view1-")


@pytest.mark.parametrize("page", ["javascript:alert(1)", "http://evil.example/", "films/../x.html", "x.html", "films/"])
def test_other_links_are_refused(page):
    with pytest.raises(ValueError, match="page must be a name that page_name returns"):
        FilmRow("a.png", page=page)


def test_row_without_page_and_maps_of_another_shape_are_refused(tmp_path):
    row, example = samples.rows(pages=1)[0], samples.examples(1)[0]
    with pytest.raises(ValueError, match=r"row must name a page, got None for patients/1\.png"):
        write_film(tmp_path / "report.html", samples.rows()[1], example)
    with pytest.raises(ValueError, match=r"map 'x' must have shape \(24, 20\), got \(2, 2\)"):
        write_film(tmp_path / "report.html", row, example, maps=[HeatMap("x", np.zeros((2, 2)))])
    assert not (tmp_path / "films").exists()


def test_pages_of_an_earlier_report_are_removed_and_other_files_stay(tmp_path):
    remove_films(tmp_path / "report.html")  # no folder yet
    write_film(tmp_path / "report.html", samples.rows(pages=1)[0], samples.examples(1)[0])
    (tmp_path / "films" / "notes.html").write_text("mine")
    remove_films(tmp_path / "report.html")
    assert os.listdir(tmp_path / "films") == ["notes.html"]

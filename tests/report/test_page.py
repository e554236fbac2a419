"""The report as a file: what it holds, that nothing in it is loaded or run, and that it is written atomically."""

import base64
import dataclasses
import hashlib
import io
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import samples
from PIL import Image
from samples import HOSTILE, SIGNALS, Page, write

from simsid.evaluation import Evaluation
from simsid.report import Example, FilmRow, write_picture
from simsid.report import page as module
from simsid.report.render import NOTICE


def pixels(attributes):
    kind, data = attributes["src"].split(",", 1)
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))


def pictures(page, *names):
    return [pixels(image) for image in page.images if image["alt"].startswith(names)]


@pytest.fixture(scope="module")
def arguments():
    return {
        "evaluation": samples.evaluation(),
        "examples": samples.examples(),
        "rows": samples.rows(pages=2),
        "warnings": [f"The images have shifted {HOSTILE}"],
        "descriptions": {"residual": f"mean squared difference {HOSTILE}"},
    }


@pytest.fixture(scope="module")
def text(arguments, tmp_path_factory):
    return write(tmp_path_factory.mktemp("report") / "report.html", **arguments)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_page_loads_nothing(page, text):
    assert all(value.startswith("data:image/png;base64,") for value in page.loaded)
    assert all(re.fullmatch(r"#example-\d|films/[\w.-]+\.html", link) for link in page.links)
    assert not {"link", "iframe", "object", "embed", "base", "form", "video", "audio"} & set(page.tags)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_policy_allows_only_the_style_and_script_of_the_page(page, text):
    assert page.tags.count("script") == page.tags.count("style") == 1
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', text)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", text, re.S).group(1)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert rules == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}


def test_page_without_table_allows_no_script(tmp_path):
    text = write(tmp_path / "r.html")
    assert "script-src 'none'" in text and "<script" not in text


def test_hostile_names_are_escaped(page, text):
    assert text.count("<script") == 1
    # Title, warning, note, description, finding, example, row, reason, configuration, versions.
    assert page.text.count(HOSTILE) >= 12
    assert sum(HOSTILE in image["alt"] for image in page.images) >= 3


def test_every_picture_has_a_description(page):
    assert len(page.images) == 2 + len(SIGNALS) + 1 + 3 * 3  # curves, histograms, color scale, examples
    assert all(len(image["alt"]) > 20 for image in page.images)
    assert all(pixels(image).size for image in page.images)
    assert "residual AUC 0." in page.images[0]["alt"]


def test_figures_of_every_row_are_shown(page):
    rows = samples.evaluation().rows()
    for row in rows:
        assert f"{row.auc:.3f} {row.low:.3f} to {row.high:.3f}" in page.text
        for value in (row.average_precision, row.sensitivity, row.specificity, row.f1, row.best_accuracy, row.best_f1):
            assert f"{value:.3f}" in page.text
    assert f"threshold {rows[0].threshold:.5g}" in page.text
    assert "Optimistic: best on these images" in page.text
    assert page.text.count(NOTICE) == 2


def test_in_sample_figures_are_marked_only_where_they_are(page, tmp_path):
    assert "in-sample" not in page.text
    marked = Page(write(tmp_path / "r.html", evaluation=samples.evaluation(in_sample=True, names=["residual"]))).text
    assert "Sensitivity and false positive rate are in-sample: the held-out normal images" in marked
    assert "False positive rate (in-sample)" in marked and "At the held-out threshold, in-sample" in marked


def test_finding_named_all_stays_apart_from_the_total(tmp_path):
    evaluation = samples.evaluation(kinds=("all", "missing"), names=["residual"])
    text = Page(write(tmp_path / "r.html", evaluation=evaluation)).text
    table = text.split("AUC by finding")[1].split("Scores")[0]
    assert " all abnormal 30 " in table and " all 15 " in table and " missing 15 " in table


def colorfulness(pixels):
    """Return how far each pixel is from gray, `[H, W]`: the difference of its largest and smallest channel."""
    return np.ptp(pixels.astype(int), axis=-1)


def test_example_pictures_show_the_example(page):
    example = samples.examples()[0]
    shown = pictures(page, "input", "reconstruction", "heat")
    np.testing.assert_allclose(shown[0] / 127.5 - 1.0, example.input, atol=0.005)
    np.testing.assert_allclose(shown[1] / 127.5 - 1.0, example.reconstruction, atol=0.005)
    assert shown[2].shape == (24, 20, 3)
    hot, cold = example.heat_map > 4.0, example.heat_map < 0.2
    assert colorfulness(shown[2])[hot].min() > 5.0 * colorfulness(shown[2])[cold].max()


def test_examples_share_one_heat_scale(tmp_path):
    quiet, loud = samples.examples(2)
    quiet = dataclasses.replace(quiet, heat_map=0.01 * quiet.heat_map, path="quiet.png")
    page = Page(write(tmp_path / "r.html", examples=[quiet, loud]))
    strongest = [colorfulness(pixels).max() for pixels in pictures(page, "heat map")]
    assert strongest[0] < 5 < 100 < strongest[1]


def test_examples_without_reconstruction_or_map_show_the_input(tmp_path):
    example = dataclasses.replace(samples.examples(1)[0], reconstruction=None, heat_map=None)
    page = Page(write(tmp_path / "r.html", examples=[example]))
    assert [image["alt"].split()[0] for image in page.images] == ["input"]
    assert "color scale" not in page.text


def test_page_without_labels_shows_no_figures(tmp_path):
    page = Page(write(tmp_path / "r.html", examples=samples.examples(4)))
    assert len(page.images) == 12 + 1
    assert "AUC" not in page.text and "Examples" in page.text


def test_page_without_held_out_images_has_no_threshold(tmp_path):
    evaluation = samples.evaluation(kinds=("PNEUMONIA",), held_out=0, names=["residual"])
    page = Page(write(tmp_path / "r.html", evaluation=evaluation))
    assert len(page.images) == 2 + 1
    assert "Examples" not in page.text and "no held-out normal images" in page.text
    assert "all abnormal" not in page.text.split("AUC by finding")[1].split("Scores")[0]


def test_too_few_held_out_images_are_reported(tmp_path):
    evaluation = samples.evaluation(held_out=5, names=["residual"])
    with pytest.warns(UserWarning, match="cannot guarantee"):
        page = Page(write(tmp_path / "r.html", evaluation=evaluation))
    assert "5 held-out normal images, too few to guarantee that" in page.text


def test_extreme_values_draw_without_warnings(tmp_path):
    labels = np.array([0, 0, 1])
    scores = {"residual": np.zeros(3), "_odd": np.array([0.0, 1e300, -1e300])}
    evaluation = Evaluation(
        labels, ["a", "b", "$\\frac$"], ["", "", ""], scores, "residual", {"residual": np.zeros(30)}
    )
    flat = np.full((4, 4), np.nan)
    example = Example("\udcff.png", "", None, float("nan"), flat, flat, np.zeros((4, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = write(
            tmp_path / "r.html", evaluation=evaluation, examples=[example], rows=[FilmRow("\udcff.png", score=0.5)]
        )
    assert text.count("\\udcff.png") >= 2


def test_table_sorts_by_score_with_failures_last(page):
    shown = page.text.split("All images")[1].split("Configuration and versions")[0]
    scores = sorted((row.score for row in samples.rows() if row.score is not None), reverse=True)
    positions = [shown.index(f" {score:.4f} ") for score in scores]
    assert positions == sorted(positions)
    assert positions[-1] < shown.index("not scored: the file is cut short")


def test_rows_link_to_their_page_else_to_their_example(page, arguments):
    paths = {example.path for example in arguments["examples"]}
    pages = [row.page for row in arguments["rows"] if row.page]
    assert len(pages) == 2 and set(pages) < set(page.links)
    assert [link for link in page.links if link.startswith("#")] == ["#example-3"]  # the first two have pages
    assert "patients/2.png" in paths


def test_table_of_5000_images_stays_light_and_names_what_it_leaves_out(tmp_path):
    text = write(tmp_path / "r.html", rows=samples.rows(5001))
    assert text.count("<tr><th>") == 5000
    assert len(text) < 800_000
    assert "The 5000 highest scores; 1 more files" in text and "cut short" not in text


@pytest.mark.parametrize(
    ("paths", "folder"),
    [
        (["/a/b/1.png", "/a/b/c/2.png"], "/a/b/"),
        (["/a/1.png", "b/2.png"], ""),  # absolute and relative
        (["1.png", "b/2.png"], ""),
        (["/1.png"], "/"),
        ([], ""),
    ],
)
def test_folder_that_all_files_share_is_shown_once(paths, folder):
    assert module._folder([FilmRow(path) for path in paths]) == folder


def test_large_pictures_are_reduced(tmp_path):
    page = Page(write(tmp_path / "r.html", examples=samples.examples(1, (800, 400))))
    assert [shown.shape[:2] for shown in pictures(page, "input", "reconstruction", "heat")] == [(384, 192)] * 3


def test_same_arguments_give_the_same_bytes(arguments, text, tmp_path):
    assert write(tmp_path / "r.html", **arguments) == text


def test_failed_write_keeps_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    write(path)
    assert path.read_text("utf-8").endswith("</html>\n")
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write(path, title="new")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("labelled", [True, False])
def test_picture_is_1200_pixels_wide(tmp_path, labelled):
    path = tmp_path / "picture.png"
    write_picture(path, samples.examples(5), samples.evaluation() if labelled else None)
    picture = Image.open(path)
    assert picture.width == 1200 and 400 < picture.height < 1200
    assert len(picture.convert("RGB").getcolors(1 << 24)) > 500
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="at least one example"):
        write_picture(path, [])


def test_examples_of_unequal_shapes_are_refused():
    good = samples.examples(1)[0]
    with pytest.raises(ValueError, match=r"share one shape \[H, W\], got .*'heat_map': \[3, 3\]"):
        dataclasses.replace(good, heat_map=np.zeros((3, 3)))
    with pytest.raises(ValueError, match="share one shape"):
        dataclasses.replace(good, **dict.fromkeys(("input", "reconstruction", "heat_map"), np.zeros(3)))


def test_import_loads_no_drawing_library():
    code = """
import sys, simsid.report
late = {"matplotlib", "sklearn"} & set(sys.modules)
assert not late, late
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_drawing_ignores_and_keeps_the_settings_of_matplotlib(tmp_path):
    import matplotlib

    example = samples.examples(1)
    write_picture(tmp_path / "plain.png", example)
    with matplotlib.rc_context({"font.size": 33, "axes.grid": False}):
        before = matplotlib.rcParams.copy()
        write_picture(tmp_path / "set.png", example)
        assert all(matplotlib.rcParams[name] == before[name] for name in before if name != "backend")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "set.png").read_bytes()

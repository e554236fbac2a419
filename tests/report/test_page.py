import base64
import dataclasses
import io
import subprocess
import sys
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from simsid.metrics import Evaluation
from simsid.report.page import NOTICE, Example, write_picture, write_report

NASTY = '<script src="http://evil.example/x.js">alert(1)</script>&"\'$x_$.png'
SIGNALS = ("local_residual", "residual", "discriminator_running")


class Page(HTMLParser):
    """Collects what a browser would load and show."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loaded, self.images, self.shown = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.loaded += [value for name, value in attributes.items() if name in ("src", "href", "srcset", "data")]
        if tag == "img":
            self.images.append(attributes)

    def handle_data(self, data):
        self.shown.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.shown).split())


def some_evaluation(kinds=("missing", NASTY), held_out=40):
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], [40, 30])
    findings = ["NORMAL"] * 40 + [kinds[i % len(kinds)] for i in range(30)]
    signals = {name: generator.normal(size=70) + place * labels for place, name in enumerate(SIGNALS)}
    holdout = {name: generator.normal(size=held_out) for name in SIGNALS} if held_out else None
    return Evaluation(labels, findings, [f"{i}.png" for i in range(70)], signals, "residual", holdout)


def some_examples(count=3, shape=(24, 20)):
    generator = np.random.default_rng(1)
    return [
        Example(
            path=f"patients/{NASTY}" if i == 0 else f"patients/{i}.png",
            finding=NASTY if i == 0 else "missing",
            label=(1, 0, None)[i % 3],
            score=0.5 * i,
            input=generator.uniform(-1, 1, shape).astype(np.float32),
            reconstruction=generator.uniform(-1, 1, shape).astype(np.float32),
            heat_map=generator.exponential(size=shape).astype(np.float32),
        )
        for i in range(count)
    ]


def write(path, **changes):
    arguments = {
        "title": f"Report {NASTY}",
        "evaluation": None,
        "examples": [],
        "configuration": {"model": {"width": 8, NASTY: NASTY}, NASTY: {}},
        "versions": {"simsid": "0.1.0", NASTY: NASTY},
        "notes": [NASTY],
    }
    write_report(path, **{**arguments, **changes})
    return path.read_text("utf-8")


def pixels(attributes):
    kind, data = attributes["src"].split(",", 1)
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write(
        tmp_path_factory.mktemp("report") / "report.html", evaluation=some_evaluation(), examples=some_examples()
    )


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_nothing_is_requested(page, text):
    assert all(value.startswith("data:image/png;base64,") for value in page.loaded)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio"} & set(page.tags)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in text


def test_names_are_escaped(page, text):
    assert "<script" not in text
    assert page.text.count(NASTY) >= 6  # title, note, finding, configuration, versions, file name
    assert sum(NASTY in image["alt"] for image in page.images) >= 3


def test_every_picture_is_there_and_described(page):
    assert len(page.images) == 2 + len(SIGNALS) + 3 * 3
    assert all(len(image["alt"]) > 20 for image in page.images)
    assert all(pixels(image).size for image in page.images)
    assert "residual AUC 0." in page.images[0]["alt"]


def test_the_figures_of_every_row_are_shown(page):
    rows = some_evaluation().rows()
    for row in rows:
        assert f"{row.auc:.3f} {row.low:.3f} to {row.high:.3f}" in page.text
        for value in (row.average_precision, row.sensitivity, row.specificity, row.f1, row.best_accuracy, row.best_f1):
            assert f"{value:.3f}" in page.text
    assert f"threshold {rows[0].threshold:.5g}" in page.text
    assert "Optimistic: best on these images" in page.text
    assert page.text.count(NOTICE) == 2


def test_example_pictures_are_the_examples(page):
    example = some_examples()[0]
    shown = [pixels(image) for image in page.images if image["alt"].startswith(("input", "reconstruction", "heat"))]
    np.testing.assert_allclose(shown[0] / 127.5 - 1.0, example.input, atol=0.005)
    np.testing.assert_allclose(shown[1] / 127.5 - 1.0, example.reconstruction, atol=0.005)
    assert shown[2].shape == (24, 20, 3)
    hot, cold = example.heat_map > 4.0, example.heat_map < 0.2
    assert shown[2][hot].mean() > 2.0 * shown[2][cold].mean()


def test_all_examples_share_one_heat_scale(tmp_path):
    quiet, loud = some_examples(2)
    quiet = dataclasses.replace(quiet, heat_map=0.01 * quiet.heat_map, path="quiet.png")
    page = Page(write(tmp_path / "r.html", examples=[quiet, loud]))
    shown = {image["alt"].split()[3]: pixels(image) for image in page.images if image["alt"].startswith("heat map")}
    redness = [shown[name][..., 0].astype(int).max() for name in ("quiet.png,", "1.png,")]
    assert redness[0] < 150 < redness[1]


def test_without_labels_only_the_examples_are_shown(tmp_path):
    page = Page(write(tmp_path / "r.html", examples=some_examples(4)))
    assert len(page.images) == 12
    assert "AUC" not in page.text
    assert "Examples" in page.text


def test_without_examples_or_held_out_images(tmp_path):
    page = Page(write(tmp_path / "r.html", evaluation=some_evaluation(kinds=("PNEUMONIA",), held_out=0)))
    assert len(page.images) == 2 + len(SIGNALS)
    assert "Examples" not in page.text
    assert "no held-out normal images" in page.text
    assert "all abnormal" not in page.text.split("AUC by finding")[1].split("Scores")[0]


def test_too_few_held_out_images_are_confessed(tmp_path):
    with pytest.warns(UserWarning, match="cannot promise"):
        page = Page(write(tmp_path / "r.html", evaluation=some_evaluation(held_out=5)))
    assert "5 held-out normal images, too few to promise that" in page.text


def test_extreme_input_draws(tmp_path):
    labels = np.array([0, 0, 1])
    scores = {"residual": np.zeros(3), "_odd": np.array([0.0, 1e300, -1e300])}
    evaluation = Evaluation(
        labels, ["a", "b", "$\\frac$"], ["", "", ""], scores, "residual", {"residual": np.zeros(30)}
    )
    flat = np.full((4, 4), np.nan)
    example = Example("\udcff.png", "", None, float("nan"), flat, flat, np.zeros((4, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = write(tmp_path / "r.html", evaluation=evaluation, examples=[example])
    assert "\\udcff.png" in text


def test_large_pictures_are_reduced(tmp_path):
    page = Page(write(tmp_path / "r.html", examples=some_examples(1, (800, 400))))
    assert [pixels(image).shape[:2] for image in page.images] == [(384, 192)] * 3


def test_the_same_arguments_give_the_same_bytes(text, tmp_path):
    assert write(tmp_path / "r.html", evaluation=some_evaluation(), examples=some_examples()) == text


def test_the_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    write(path)
    assert path.read_text("utf-8").endswith("</html>\n")
    assert list(tmp_path.iterdir()) == [path]
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write(path, title="new")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("labelled", [True, False])
def test_picture_is_1200_wide(tmp_path, labelled):
    path = tmp_path / "picture.png"
    write_picture(path, some_examples(5), some_evaluation() if labelled else None)
    picture = Image.open(path)
    assert picture.width == 1200
    assert 400 < picture.height < 1200
    assert len(picture.convert("RGB").getcolors(1 << 24)) > 500
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="at least one example"):
        write_picture(path, [])


def test_examples_are_checked():
    good = some_examples(1)[0]
    with pytest.raises(ValueError, match=r"share one shape \[H, W\], got \[\[24, 20\], \[24, 20\], \[3, 3\]\]"):
        dataclasses.replace(good, heat_map=np.zeros((3, 3)))
    with pytest.raises(ValueError, match="share one shape"):
        dataclasses.replace(good, **dict.fromkeys(("input", "reconstruction", "heat_map"), np.zeros(3)))


def test_libraries_load_late_and_matplotlib_keeps_its_settings(tmp_path):
    code = f"""
import sys
import simsid.models.baselines, simsid.metrics, simsid.report.page
late = {{"matplotlib", "sklearn", "PIL", "torch"}}
assert not late & set(sys.modules), late & set(sys.modules)
import matplotlib
matplotlib.rcParams["font.size"] = 33
before = matplotlib.rcParams.copy()
simsid.report.page.write_report(
    {str(tmp_path / "r.html")!r}, title="", evaluation=None, examples=[], configuration={{}}, versions={{}}
)
assert "matplotlib.pyplot" not in sys.modules
assert all(matplotlib.rcParams[name] == before[name] for name in before if name != "backend")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

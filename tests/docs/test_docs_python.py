"""Every Python snippet of the pages, run as it stands but for the numbers named here."""

import importlib.util
import re

import documents
import pytest
from PIL import Image

PAGES = [page for page in documents.PAGES if documents.blocks(page, "python")]
REDUCED = {
    "README.md": {"epochs=60": "epochs=1"},
    "docs/training.md": {
        "epochs=2": "epochs=1",
        "FeatureMemory()": "FeatureMemory(items=5, components=6)",
        "weights=ResNet18_Weights.DEFAULT": "weights=None",
        "pretrained=True": "pretrained=False",
    },
    "docs/reproducibility.md": {"train=2000": "train=20"},
}


def is_installed(block):
    """Whether the package is there that a snippet names in its first line, as in `# needs timm`."""
    name = re.match(r"# needs (\w+)", block)
    return name is None or importlib.util.find_spec(name[1]) is not None


def run(page):
    """Run the snippets of a page one after the other, as a reader would; returns their names."""
    code = "".join(block for block in documents.blocks(page, "python") if is_installed(block))
    for long, short in REDUCED.get(page, {}).items():
        assert documents.PAGES[page].count(long) == 1, (page, long)
        code = code.replace(long, short)
    names = {}
    exec(compile(code, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("README.md", "docs/reproducibility.md")])
def test_snippets_of_a_page_run(page, world):
    run(page)


def test_snippets_of_the_readme_train_a_model_and_score_one_image(world, capsys):
    names = run("README.md")
    assert names["trainer"].model.calibration is not None
    assert "tensor([0." in capsys.readouterr().out
    assert names["heat_map"].shape == (1, *names["image"].shape[2:])


def test_picture_of_the_readme_is_drawn_as_the_page_says(world):
    run("docs/reproducibility.md")
    for name in ("demo.png", "radiographs.png"):
        with Image.open(name) as drawn, Image.open(documents.ROOT / "docs" / name) as shown:
            assert drawn.size == shown.size and shown.mode == "P"

"""Every Python snippet of the pages, run as it stands but for the numbers named here."""

import importlib

import documents
import numpy as np
import pytest
from PIL import Image

from simsid import data

PAGES = [page for page in documents.PAGES if documents.blocks(page, "python")]
REDUCED = {
    "README.md": {"epochs=60": "epochs=1"},
    "docs/training.md": {
        "epochs=2": "epochs=1",
        "FeatureMemory()": "FeatureMemory(items=5, components=6)",
    },
    "docs/reproducibility.md": {"train=2000": "train=20"},
}


FOREIGN = [block for block in documents.blocks("docs/training.md", "python") if block.startswith("# needs ")]
"""Snippets for which a package is installed and weights are downloaded."""


def run(page):
    """Run the snippets of a page one after the other, as a reader would; returns their names."""
    code = "".join(block for block in documents.blocks(page, "python") if block not in FOREIGN)
    for long, short in REDUCED.get(page, {}).items():
        assert documents.PAGES[page].count(long) == 1, (page, long)
        code = code.replace(long, short)
    names = {}
    exec(compile(code, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("README.md", "docs/reproducibility.md")])
def test_snippets_of_a_page_run(page, world):
    run(page)


@pytest.mark.parametrize("block", FOREIGN, ids=lambda block: block.split()[2].strip(","))
def test_encoder_of_another_package_is_fitted_and_scores_films(block):
    """With random weights: nothing is downloaded."""
    package = block.split()[2].strip(",")
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError) as error:  # absent, or made for another PyTorch
        pytest.skip(f"{package} cannot be imported: {error}")
    offline = block.replace("weights=ResNet18_Weights.DEFAULT", "weights=None")
    offline = offline.replace("pretrained=True", "pretrained=False")
    assert offline != block
    names = {}
    exec(offline, names)
    films = data.load_images(data.read_csv(data.SAMPLES), 224).batch(slice(None))
    signals = names["model"].fit(films[:8]).signals(films)
    assert all(np.isfinite(values).all() and len(set(values)) == len(films) for values in signals.values())


def test_snippets_of_the_readme_train_a_model_and_score_one_image(world, capsys):
    names = run("README.md")
    assert names["trainer"].model.calibration is not None
    score = names["model"].score(names["image"])
    assert capsys.readouterr().out.endswith(f"{score}\n") and 0 <= score.item() <= 1
    assert names["heat_map"].shape == (1, *names["image"].shape[2:])


def test_picture_of_the_readme_is_drawn_as_the_page_says(world):
    run("docs/reproducibility.md")
    for name in ("demo.png", "radiographs.png"):
        with Image.open(name) as drawn, Image.open(documents.ROOT / "docs" / name) as shown:
            assert drawn.size == shown.size and shown.mode == "P"

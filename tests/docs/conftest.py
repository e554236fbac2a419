"""A folder with everything that the commands and snippets of the pages name, at tiny sizes."""

import csv
import pathlib
import sys

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from simsid.fields import replaced
from simsid.study import cells, images, plan

sys.path.append(str(pathlib.Path(__file__).parents[1] / "models"))
from test_released import export


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny.zhanglab(folder / "chest_xray", train=12, val=4, test=3)
    tiny.films(folder / "archive", 5)
    tiny.films(folder / "local_normals", 10, seed=1)
    tiny.film(folder / "film.png")
    _write_list(folder)
    tiny.run(folder / "runs" / "first")
    tiny.calibrated(folder / "simsid-demo")
    parts = export(tiny.model(decoder_memory="subpatch", threshold="exclusive", heads=8).eval())
    for name, tensors in zip(("model.pth", "discriminator.pth"), parts):
        torch.save(tensors, folder / name)
    return folder


@pytest.fixture
def world(world_folder, monkeypatch):
    """The folder as the working directory, a small demo, and small studies."""
    monkeypatch.chdir(world_folder)
    tiny.shrink_demo(monkeypatch)
    monkeypatch.setattr(plan, "_cost", lambda *_: (1.0, 1.0, 0.1))
    monkeypatch.setattr(cells, "configuration", _small_configuration)
    monkeypatch.setattr(images, "DIGITS", {"train": 16, "val": 4, "test_normal": 5, "test_anomalous": 4})
    return world_folder


def _small_configuration(cell, *options):
    """Return a cell's configuration with fewer pixels and levels, where it is a network's."""
    config = plan.configuration(cell, *options)
    if not plan.is_network(cell):
        return config
    sizes = {name: min(getattr(config, name), 1) for name in ("skip_levels", "merge_levels", "decoder_memories")}
    return replaced(config, {"image_size": 16 * config.patches, "levels": 2, **sizes})


def _write_list(folder):
    with open(folder / "list.csv", "w", newline="", encoding="utf-8") as file:
        write = csv.writer(file).writerow
        write(["path", "label", "split", "patient", "finding"])
        for i in range(12):
            pixels = np.random.default_rng(i).integers(0, 256, (50, 60), np.uint8)
            (folder / "listed").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / "listed" / f"{i}.png")
            write(
                [f"listed/{i}.png", int(i > 9), "train" if i < 7 else "val", f"p{i}", "opacity" if i > 9 else "normal"]
            )

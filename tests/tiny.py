"""The smallest models, films and runs that the tests of training, scoring and the command line share."""

import csv
import json
import os
import pathlib

import numpy as np
import torch
from PIL import Image

from simsid import Config, Model, checkpoint

SIZES = {"image_size": 48, "patches": 2, "levels": 2, "width": 4, "items": 6, "decoder_items": 6, "heads": 2, "topk": 2}
OPTIONS = [text for name, value in SIZES.items() for text in (f"--{name.replace('_', '-')}", str(value))]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


def config(**changes):
    return Config(**{**SIZES, **changes})


def model(seed=0, **changes):
    torch.manual_seed(seed)
    return Model(config(**changes))


def images(count, seed=0):
    """Random images `[count, 1, 48, 48]` in -1..1."""
    return torch.rand(count, 1, 48, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def calibrated(folder, seed=0, held=19, **changes):
    """Save an untrained model with a calibration, and return it as it is loaded."""
    made = model(seed, **changes)
    made.calibrate(images(8, 1), images(held, 2) if held else None)
    made.save(folder)
    return Model.load(folder)


def film(path, seed=0):
    """Write one film of noise, not square."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 52), dtype=np.uint8)
    # Through a handle, which takes names that are no text.
    with open(path, "wb") as file:
        Image.fromarray(pixels).save(file, format="PNG")
    return path


def films(folder, count, seed=0):
    """Write a folder of films."""
    return [film(pathlib.Path(folder) / f"film {i}, {seed}.png", 1000 * seed + i) for i in range(count)]


def zhanglab(folder, train=6, val=2, test=3):
    """Write films in ZhangLab's layout: `train` normal and 2 abnormal, `val` and `test` of each."""
    for place, (split, normal, abnormal) in enumerate(
        (("train", train, 2), ("val", val, val), ("test", test, test)), 1
    ):
        for i in range(100 * place, 100 * place + normal):
            film(folder / split / "NORMAL" / f"IM-{i:04d}-0001.png", i)
        for i in range(100 * place, 100 * place + abnormal):
            film(folder / split / "PNEUMONIA" / f"person{i}_bacteria_1.png", i + 1000)
    return folder


def rows(path):
    """Read a CSV as dictionaries."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def metrics(run):
    """Read metrics.jsonl without the times."""
    lines = (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def assert_same_run(one, other):
    """Two finished runs agree bit for bit: training state with optimisers, best model, calibration, metrics."""
    assert metrics(one) == metrics(other)
    for name in ("last", "model"):
        mine, about_mine = checkpoint.read(one, name)
        theirs, about_theirs = checkpoint.read(other, name)
        assert mine.keys() == theirs.keys() and len(mine) > 50
        different = [key for key in mine if not torch.equal(mine[key], theirs[key])]
        assert not different
        assert about_mine.get("calibration") == about_theirs.get("calibration")
    states = [checkpoint.read(run, "last")[1]["progress"] for run in (one, other)]
    for state in states:
        assert state["finished"]
        for epoch in state["history"]["epochs"]:
            del epoch["seconds"]
    assert states[0] == states[1]

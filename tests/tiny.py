"""The smallest models, image files and runs that the tests of training, scoring and the command line use."""

import csv
import functools
import json
import os
import pathlib
import re

import numpy as np
import torch
from PIL import Image

from simsid import Config, Model, checkpoint, data
from simsid.training.run_folder import RunFolder

SIZES = {"image_size": 48, "patches": 2, "levels": 2, "width": 4, "items": 6, "decoder_items": 6, "heads": 2, "topk": 2}
SIZES["discriminator_width"] = 2  # at its default the discriminator takes most of the time of a tiny network
ONE_LEVEL = {"image_size": 36, "levels": 1, "skip_levels": 1, "merge_levels": 1, "decoder_memories": 1}
"""Changes that leave one level: for tests of what is written and when, which no layer of a network changes."""
OPTIONS = [text for name, value in SIZES.items() for text in (f"--{name.replace('_', '-')}", str(value))]
TRAINING = [*OPTIONS, "--epochs", "1", "--batch-size", "4"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
DAMAGED = b"\x89PNG\r\n\x1a\n nothing more"
"""The content of a file that is a PNG by its first bytes and cannot be decoded."""


def config(**changes):
    return Config(**{**SIZES, **changes})


def model(seed=0, **changes):
    torch.manual_seed(seed)
    return Model(config(**changes))


def images(count, seed=0):
    """Random images `[count, 1, 48, 48]` in -1..1."""
    return noise(count, 48, seed)


def noise(count, side, seed=0):
    """Random images `[count, 1, side, side]` in -1..1."""
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def calibrated(folder, seed=0, held=19, **changes):
    """Save an untrained model with a calibration, and return it as it is loaded."""
    made = model(seed, **changes)
    made.calibrate(images(8, 1), images(held, 2) if held else None)
    made.save(folder)
    return Model.load(folder)


def write_png(path, pixels):
    """Write a PNG file, with a name that need not be text, and return its path."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Pillow takes a file object for a name of arbitrary bytes.
    with open(path, "wb") as file:
        Image.fromarray(pixels).save(file, format="PNG")
    return path


def film(path, seed=0):
    """Write a PNG of noise, not square."""
    return write_png(path, np.random.default_rng(seed).integers(0, 256, (40, 52), dtype=np.uint8))


def shrink_demo(monkeypatch):
    """Let `simsid demo` draw few digits with few pixels: its whole test set alone takes most of a minute."""
    few = functools.partial(data.DigitAnatomy, val=8, test_normal=10, test_anomalous=20)
    monkeypatch.setattr(data, "DigitAnatomy", few)
    sizes = {"levels": 2, "skip_levels": 1, "merge_levels": 1, "decoder_memories": 1}
    small = Config.digit_anatomy(image_size=48, width=4, **sizes)
    monkeypatch.setattr(Config, "digit_anatomy", small.replace)


def films(folder, count, seed=0):
    """Write a folder of PNG files of noise."""
    return [film(pathlib.Path(folder) / f"film {i}, {seed}.png", 1000 * seed + i) for i in range(count)]


def damaged(folder, name="damaged.png"):
    """Write a file that cannot be decoded, and return its path as text."""
    path = os.path.join(os.fspath(folder), name)
    with open(path, "wb") as file:
        file.write(DAMAGED)
    return path


def zhanglab(folder, train=6, val=2, test=3):
    """Write images in ZhangLab's layout: `train` normal and 2 abnormal, `val` and `test` of each."""
    counts = (("train", train, 2), ("val", val, val), ("test", test, test))
    for number, (split, normal, abnormal) in enumerate(counts, 1):
        for i in range(100 * number, 100 * number + normal):
            film(folder / split / "NORMAL" / f"IM-{i:04d}-0001.png", i)
        for i in range(100 * number, 100 * number + abnormal):
            film(folder / split / "PNEUMONIA" / f"person{i}_bacteria_1.png", i + 1000)
    return folder


def run(folder, **changes):
    """Leave a run folder as `simsid train` does, of an untrained network; its images lie in `<folder>-images`."""
    folder = pathlib.Path(folder)
    made = calibrated(folder, **changes)
    dataset = data.ZhangLab(zhanglab(folder.with_name(f"{folder.name}-images")))
    train, val = (data.load_images(part, **made.preprocessing.to_dict()) for part in data.partition(dataset, 0.2))
    with RunFolder(folder) as opened:
        opened.write_request({"command": "train"})
        opened.write_manifest(train, val)
    return folder


def write_list(path, columns, rows):
    """Write a CSV list of images, and return its path."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def rows(path):
    """Read a CSV as dictionaries."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def metrics(run):
    """Read metrics.jsonl without the times."""
    lines = (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def assert_self_contained(path):
    """The page has pictures and refers to nothing but itself and the pages of single images; returns its text."""
    page = path.read_text("utf-8")
    assert "<img" in page and "</html>" in page
    assert not re.search(r'(src|href)="(?!data:|#|films/[\w-]+\.html")', page)
    return page


def assert_same_run(one, other):
    """Two finished runs agree bit for bit: training state with optimizers, best model, calibration, metrics."""
    assert metrics(one) == metrics(other)
    for name in ("last", "model"):
        tensors, document = checkpoint.read(one, name)
        other_tensors, other_document = checkpoint.read(other, name)
        assert tensors.keys() == other_tensors.keys() and len(tensors) > 50
        different = [key for key in tensors if not torch.equal(tensors[key], other_tensors[key])]
        assert not different
        assert document.get("calibration") == other_document.get("calibration")
    states = [checkpoint.read(run, "last")[1]["progress"] for run in (one, other)]
    for state in states:
        assert state["finished"]
        for epoch in state["history"]["epochs"]:
            del epoch["seconds"]
    assert states[0] == states[1]


def cells(table):
    """Return the cells of each row of a Markdown table, its head and rule included."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]

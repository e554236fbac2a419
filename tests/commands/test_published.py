"""CheXpert and COVIDx in small trees laid out as published: what is trained on, and a row for each finding."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from simsid import load
from simsid.data import open_dataset, partition
from simsid.evaluation import evaluate

FINDINGS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture"),
    "Support Devices",
)


def write_image(path, seed):
    """Write noise as JPEG or PNG, by the path's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 52), np.uint8)).save(path)


@pytest.fixture
def chexpert(tmp_path):
    """CheXpert-v1.0-small: 12 normal radiographs to train on, 9 to validate, among them lateral, AP and uncertain."""
    marked = [{"No Finding": "1.0"}] * 3 + [{"Edema": "1.0", "Fracture": "-1.0"}, {"Edema": "1.0", "Fracture": "1.0"}]
    marked += [{"Fracture": "1.0", "Support Devices": "1.0"}, {"Edema": "-1.0"}]
    views = [("Frontal", "PA")] * len(marked) + [("Frontal", "AP"), ("Lateral", "")]
    lists = {
        "train": [({"No Finding": "1.0"}, ("Frontal", "PA"))] * 12,
        "valid": list(zip([*marked, *[{"No Finding": "1.0"}] * 2], views)),
    }
    root = tmp_path / "CheXpert-v1.0-small"
    for split, entries in lists.items():
        rows = [["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *FINDINGS]]
        for i, (marks, view) in enumerate(entries):
            name = f"{split}/patient{i + 64541 * (split == 'valid'):05d}/study1/view1_{view[0].lower()}.jpg"
            write_image(root / name, len(rows) + 100 * (split == "valid"))
            rows.append([f"{root.name}/{name}", "Male", "50", *view, *(marks.get(finding, "") for finding in FINDINGS)])
        with open(root / f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
    return root


@pytest.fixture
def covidx(tmp_path):
    """COVIDx CXR-2: the lists beside the folders of images, all kinds in one folder."""
    root = tmp_path / "covidx"
    kinds = {"train": ["normal"] * 10 + ["pneumonia"], "test": ["normal"] * 2 + ["pneumonia"] * 2 + ["COVID-19"] * 2}
    for split, labels in kinds.items():
        lines = []
        for i, label in enumerate(labels):
            write_image(root / split / f"{split}-{i}.png", i + 50 * (split == "test"))
            lines.append(f"{split}{i} {split}-{i}.png {label} rsna\n")
        (root / f"{split}.txt").write_text("".join(lines))
    return root


def kinds(path):
    """Return (normal, abnormal) of each kind of finding in metrics.json, of the first signal."""
    rows = json.loads((path / "metrics.json").read_text())["rows"]
    first = [row for row in rows if row["signal"] == rows[0]["signal"]]
    return {row["finding"]: (row["normal"], row["abnormal"]) for row in first}


def test_chexpert_has_a_row_for_each_finding_and_says_what_uncertain_marks_count_as(simsid, model, chexpert):
    done = simsid("evaluate", model, chexpert, "-o", "out")
    assert done.code == 0, done.err
    assert "valid.csv: 2 frontal PA radiographs have a mark of -1 (uncertain), which counts as not" in done.err
    assert kinds(chexpert.parent / "out") == {None: (3, 3), "Edema": (3, 2), "Fracture": (3, 2)}
    rows = [line.split()[:3] for line in done.out.splitlines() if line.startswith(" ")]
    assert rows[:2] == [["Edema", "2", "3"], ["Fracture", "2", "3"]], "images with both count in both"


def test_covidx_has_rows_of_pneumonia_and_covid(model, covidx):
    rows = evaluate(load(model), open_dataset(covidx).load("test", 48), signal="residual").rows()
    found = {row.finding: (row.normal, row.abnormal) for row in rows if row.signal == "residual"}
    assert found == {None: (2, 4), "COVID-19": (2, 2), "pneumonia": (2, 2)}


@pytest.mark.filterwarnings("ignore:.*uncertain")
def test_only_normal_images_of_the_training_list_are_trained_on(chexpert, covidx):
    for folder, normal, abnormal in ((chexpert, 12, 3), (covidx, 10, 0)):
        train, val = partition(open_dataset(folder), 0.3)
        assert {record.label for record in train} == {0} and {record.split for record in train} == {"train"}
        assert len(train) + sum(record.label == 0 for record in val) == normal + 3 * (folder == chexpert)
        assert sum(record.label == 1 for record in val) == abnormal

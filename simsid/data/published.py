"""Readers of the lists with which CheXpert and COVIDx are published."""

import csv
import os
import re
import warnings

from simsid.data.records import Record
from simsid.errors import InputError

_CHEXPERT_FINDINGS = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
)


def read_chexpert(folder: str, name: str, split: str) -> list[Record]:
    """Return the frontal PA radiographs of CheXpert's `train.csv` or `valid.csv`; see `simsid.data.CheXpert`."""
    path = os.path.join(folder, name)
    records, uncertain, left_out = [], 0, 0
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = {"Path", "Frontal/Lateral", "AP/PA", "No Finding", *_CHEXPERT_FINDINGS} - set(reader.fieldnames or ())
        if missing:
            raise InputError(f"{path}, line 1: columns are missing: {', '.join(sorted(missing))}")
        for row in reader:
            if row["Frontal/Lateral"] != "Frontal" or row["AP/PA"] != "PA":
                continue
            findings = [finding for finding in _CHEXPERT_FINDINGS if _is(1, row[finding])]
            is_uncertain = any(_is(-1, row[finding]) for finding in ("No Finding", *_CHEXPERT_FINDINGS))
            uncertain += is_uncertain
            if not findings and not _is(1, row["No Finding"]):
                left_out += is_uncertain
                continue
            # Published paths begin with the archive's name ("CheXpert-v1.0-small/train/..."), which users rename.
            match = re.search(r"(?:^|/)((?:train|valid|test)/(patient\d+)/.+)$", row["Path"])
            if not match:
                where = f"{path}, line {reader.line_num}, column Path"
                raise InputError(f"{where}: expected .../train/patient.../..., got {row['Path']!r}")
            finding = "; ".join(findings) or "No Finding"
            records.append(Record(os.path.join(folder, match[1]), split, int(bool(findings)), finding, match[2]))
    if uncertain:
        warnings.warn(
            f"{path}: {uncertain} frontal PA radiographs have a mark of -1 (uncertain), which counts as not marked; "
            f"{left_out} of them have no other mark and are left out",
            stacklevel=5,
        )
    return records


def _is(mark: int, cell: str | None) -> bool:
    return (cell or "").strip() in (f"{mark}", f"{mark}.0")


def read_covidx(folder: str, split: str) -> list[Record]:
    """Return the images that COVIDx's `train.txt` or `test.txt` lists; see `simsid.data.COVIDx`."""
    path = os.path.join(folder, split + ".txt")
    classes = {"normal": 0, "pneumonia": 1, "COVID-19": 1}
    records = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            patient, *name, finding, _ = line.split() if len(line.split()) >= 4 else ("", "", "")
            if not name:
                raise InputError(
                    f"{path}, line {number}: expected 'patient filename label source', got {line.strip()!r}"
                )
            if finding not in classes:
                raise InputError(f"{path}, line {number}: label must be one of {', '.join(classes)}, got {finding!r}")
            # File names may hold spaces; the other three fields do not.
            image = os.path.join(folder, split, " ".join(name))
            records.append(Record(image, split, classes[finding], finding, patient))
    return records

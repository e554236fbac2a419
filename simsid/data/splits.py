"""Divides a data set into training and validation images, the images of one patient on one side."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from simsid.arguments import require_instance, require_number
from simsid.data.datasets import Dataset
from simsid.data.records import Record
from simsid.errors import InputError

# Fewer held-out normal images give no usable threshold at a false-positive rate of 0.05.
FEWEST_HELD_OUT = 50
VAL_FRACTION = 0.1


def partition(dataset: Dataset, val_share: float = VAL_FRACTION) -> tuple[list[Record], list[Record]]:
    """Choose the images to train on, normal ones only, and those to validate on.

    The data set's own splits are kept, and its test images are not used. Where it has fewer than 50 normal validation
    images, a fraction of the normal training images joins them, patients kept apart; so do abnormal images without a
    split whose patients are not trained on.

    Args:
        val_share: fraction of the normal training images to hold out, strictly between 0 and 1.

    Returns:
        Records with split `"train"`, and records with split `"val"`.

    Raises:
        InputError: no normal image to train on, or a fraction outside (0, 1).
    """
    require_instance("dataset", dataset, Dataset)
    _check_fraction(val_share)
    train = [record for record in dataset.records if record.split in ("", "train") and record.label != 1]
    val = [record for record in dataset.records if record.split == "val"]
    if not train:
        raise InputError(f"{dataset.name} has no normal image to train on")
    if sum(record.label != 1 for record in val) < FEWEST_HELD_OUT:
        train = split_by_patient([replace(record, split="") for record in train], val_share)
        val += [record for record in train if record.split == "val"]
        trained = {record.patient for record in train if record.split != "val"} - {""}
        val += [
            record
            for record in dataset.records
            if record.split == "" and record.label == 1 and record.patient not in trained
        ]
    train = [replace(record, split="train") for record in train if record.split != "val"]
    return train, [replace(record, split="val") for record in val]


def split_by_patient(records: Iterable[Record], val_share: float = VAL_FRACTION, seed: int = 0) -> list[Record]:
    """Divide records without a split into `"train"` and `"val"`, the images of one patient on one side.

    The draw depends on the patients' names (where the patient is unknown, on the path below the records' common
    folder), the labels and `seed`, but not on the order of the records or the location of the folder. Each class gives
    the fraction `val_share` of its images to `"val"`, rounded to whole patients, at least one patient on each side
    where there are two. Records that name a split keep it, and a patient with a split keeps that one.

    Args:
        val_share: fraction of the images that goes to `"val"`, strictly between 0 and 1.

    Returns:
        The records in the given order.

    Raises:
        InputError: a fraction outside (0, 1).
    """
    _check_fraction(val_share)
    records = list(records)
    taken = {record.patient: record.split for record in records if record.patient and record.split}
    undecided = [record for record in records if not record.split and record.patient not in taken]
    folder = _common_folder(undecided)
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in undecided:
        groups[_group(record, folder)].append(record)
    strata: dict[int, list[str]] = defaultdict(list)
    for name, images in groups.items():
        # A patient with normal and abnormal images counts as abnormal.
        strata[max(-1 if record.label is None else record.label for record in images)].append(name)

    split_of: dict[str, str] = {}
    for names in strata.values():
        sizes = {name: len(groups[name]) for name in names}
        split_of.update(_draw(sizes, val_share, seed))
    return [
        record if record.split else replace(record, split=taken.get(record.patient) or split_of[_group(record, folder)])
        for record in records
    ]


def _draw(sizes: dict[str, int], val_share: float, seed: int) -> dict[str, str]:
    """Assign groups of images to `"train"` or `"val"`, in the order of a hash of their names."""
    names = sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode(errors="surrogateescape")).digest())
    wanted, assigned = val_share * sum(sizes.values()), 0
    split_of = {}
    for i, name in enumerate(names):
        first, last = i == 0, i == len(names) - 1
        # Half a patient too many is rounded down, so that the fraction is met to the nearest whole patient.
        to_val = len(names) > 1 and not last and (first or assigned + sizes[name] / 2 <= wanted)
        split_of[name] = "val" if to_val else "train"
        assigned += sizes[name] if to_val else 0
    return split_of


def _check_fraction(val_share: float) -> None:
    require_number("val_share", val_share)
    if not 0 < val_share < 1:
        raise InputError(f"val_share must lie strictly between 0 and 1, got {val_share}")


def _group(record: Record, folder: str) -> str:
    """Name what must stay together: the patient, or the single image where the patient is unknown."""
    if record.patient:
        return "patient:" + record.patient
    name = os.path.relpath(record.path, folder) if folder else record.path
    return "image:" + name.replace(os.sep, "/")


def _common_folder(records: Sequence[Record]) -> str:
    try:
        return os.path.commonpath([os.path.dirname(record.path) for record in records if not record.patient])
    except ValueError:  # there are none, or absolute and relative paths are mixed
        return ""

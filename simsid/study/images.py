"""The images of a study: the same for all of its cells, at the size that each model takes."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from simsid.data import DigitAnatomy, ImageSet, Preprocessing, Record, load_images, open_dataset, partition
from simsid.errors import InputError
from simsid.evaluation import require_labels

DIGITS = {"train": 2000, "val": 50, "test_normal": 100, "test_anomalous": 200}
"""Images of the default data."""


class StudyImages:
    """Training, validation and evaluation images of a study, decoded once for each size.

    A model is evaluated on the split `test` where the data has it, else on the validation images. Labels of validation
    images are used for the evaluation alone, unless the study chooses epochs by AUC.

    Args:
        source: a folder or list of labeled images; None is DigitAnatomy.
        most: normal training images to use at most, drawn once for all cells; None is every one.
        contaminated: whether abnormal training images are needed.
        exclude: patterns of files to leave out.
        workers: threads that decode; None is one per core.

    Raises:
        InputError: no labeled images to evaluate, or no abnormal training images where they are needed.
    """

    def __init__(
        self,
        source: str | os.PathLike | None,
        *,
        most: int | None = None,
        contaminated: bool = False,
        exclude: Sequence[str] = (),
        workers: int | None = None,
    ) -> None:
        self.digits = source is None
        if source is None:
            count = min(most or DIGITS["train"], DIGITS["train"])
            counts: Any = {**DIGITS, "train": count, "train_anomalous": count if contaminated else 0}
            dataset: Any = DigitAnatomy(**counts)
            self._load: Any = dataset.load_records
        else:
            dataset = open_dataset(source, exclude=exclude)
            self._load = lambda records, to: load_images(records, **dataclasses.asdict(to), workers=workers)
        self.name = dataset.name if source is None else pathlib.Path(source).resolve().name
        # DigitAnatomy has as many validation images as it was asked for; a folder may have too few.
        train, val = (
            ([record for record in dataset.select("train") if not record.label], dataset.select("val"))
            if self.digits
            else partition(dataset)
        )
        splits = {record.split for record in dataset.records}
        self.split = "test" if "test" in splits else "val"
        evaluated = dataset.select("test") if self.split == "test" else val
        require_labels(record.label for record in evaluated)
        abnormal = [record for record in dataset.records if record.split == "train" and record.label == 1]
        if contaminated and not abnormal:
            raise InputError(f"the study needs abnormal training images (split train), and {self.name} has none")
        self._parts = {
            "normal": _drawn(train, most),
            "abnormal": abnormal if contaminated else [],
            "val": val,
            "evaluated": evaluated,
        }
        self._loaded: dict[tuple[str, Preprocessing], ImageSet] = {}

    @property
    def train_count(self) -> int:
        """Training images of a cell."""
        return len(self._parts["normal"])

    @property
    def evaluated_counts(self) -> tuple[int, int]:
        """Normal and abnormal images that are evaluated."""
        labels = [record.label for record in self._parts["evaluated"]]
        return labels.count(0), labels.count(1)

    def train(self, preprocessing: Preprocessing, normal_share: float = 1.0, seed: int = 0) -> ImageSet:
        """Return the training images; abnormal ones take the place of normal ones, drawn by `seed`, labeled normal.

        Raises:
            InputError: fewer abnormal training images than the share needs.
        """
        normal = self._part("normal", preprocessing)
        if normal_share == 1.0:
            return normal
        abnormal = self._part("abnormal", preprocessing)
        count = round((1 - normal_share) * len(normal))
        if count > len(abnormal):
            raise InputError(f"{self.name} has {len(abnormal)} abnormal training images, and {count} are needed")
        rng = np.random.default_rng(seed)
        kept = normal.select(np.sort(rng.permutation(len(normal))[count:]))
        added = abnormal.select(np.sort(rng.permutation(len(abnormal))[:count]))
        # A model must not be able to tell them apart.
        records = [*kept.records, *(dataclasses.replace(record, label=0) for record in added.records)]
        return ImageSet(torch.cat([kept.pixels, added.pixels]), tuple(records), sha256=kept.sha256 + added.sha256)

    def val(self, preprocessing: Preprocessing, labeled: bool) -> ImageSet | None:
        """Return the validation images; without labels the normal ones alone, or None where there are none."""
        val = self._part("val", preprocessing)
        if labeled:
            return val
        normal = np.flatnonzero(val.labels != 1)
        return val.select(normal) if len(normal) else None

    def evaluated(self, preprocessing: Preprocessing) -> ImageSet:
        """Return the images to evaluate."""
        return self._part("evaluated", preprocessing)

    def _part(self, name: str, preprocessing: Preprocessing) -> ImageSet:
        key = (name, preprocessing)
        if key not in self._loaded:
            self._loaded[key] = self._load(self._parts[name], preprocessing)
        return self._loaded[key]


def _drawn(records: list[Record], most: int | None) -> list[Record]:
    """Return at most `most` records, the same ones every time, in their order."""
    if most is None or most >= len(records):
        return records
    chosen = np.random.default_rng(0).permutation(len(records))[:most]
    return [records[i] for i in np.sort(chosen)]

"""Data sets as they are published, each a list of records."""

import csv
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from simsid.data.folders import is_image, iter_images, list_images
from simsid.data.images import ImageSet, ImageSize, load_images
from simsid.data.records import SPLITS, Record, iter_csv, read_csv, split_from_name

Path = str | os.PathLike[str]


class Dataset:
    """A list of images.

    Arguments:
        records: the images; ``.records`` holds them as a tuple.
        name: what messages call it.
    Raises: ValueError for no record.
    """

    def __init__(self, records: Iterable[Record], name: str) -> None:
        self.records = tuple(records)
        self.name = name
        if not self.records:
            raise ValueError(f"{name} has no image")

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}: {self._split_counts()})"

    def load(self, split: str | None = None, image_size: ImageSize = 128, **options: Any) -> ImageSet:
        """Decode the images of one split, or all, as `load_images` does with the same options.

        Raises: ValueError where the split has no image, or none can be read.
        """
        return load_images(self.select(split), image_size, **options)

    def select(self, split: str | None = None) -> list[Record]:
        """Return the records of one split (``""``: of none), or all. Raises: ValueError where there are none."""
        records = [record for record in self.records if split is None or record.split == split]
        if not records:
            raise ValueError(f"{self.name} has no {split!r} split; it has {self._split_counts()}")
        return records

    def _split_counts(self) -> str:
        counts = Counter(record.split for record in self.records)
        return ", ".join(f"{counts[name]} {name or 'without a split'}" for name in (*SPLITS, "") if counts[name])


class Radiographs(Dataset):
    """Any folder of PNG, JPEG, TIFF, BMP and DICOM images, at any depth.

    Labels are unknown: the names of folders are not taken for classes. A folder named train, val (valid, validation) or
    test, in any case, gives the split.

    Raises: ValueError for a folder without an image; OSError where it cannot be listed.
    """

    def __init__(self, folder: Path) -> None:
        folder = _folder(folder)
        super().__init__(_radiographs(folder), folder)


class ZhangLab(Dataset):
    """Paediatric chest radiographs as published: ``chest_xray/{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg``.

    Source: Kermany, Zhang, Goldbaum, 2018. Takes the folder ``chest_xray`` or the one that holds it; splits may be
    missing. ``label`` is 1 for PNEUMONIA; ``patient`` is the part of the file name that numbers the person
    (``IM-0115``, ``NORMAL2-IM-0115``, which is another, and ``person1000``).

    Raises: ValueError where the folder has another layout.
    """

    def __init__(self, folder: Path) -> None:
        folder = _folder(folder)
        root = self._root(folder)
        if root is None:
            raise ValueError(f"{folder} has no train, val or test folder with NORMAL or PNEUMONIA in it")
        super().__init__(
            (
                Record(path, split, label, finding, _zhanglab_patient(path))
                for split in SPLITS
                for label, finding in enumerate(("NORMAL", "PNEUMONIA"))
                if os.path.isdir(os.path.join(root, split, finding))
                for path in list_images(os.path.join(root, split, finding))
            ),
            folder,
        )

    @staticmethod
    def _root(folder: str) -> str | None:
        for root in (folder, os.path.join(folder, "chest_xray")):
            if any(os.path.isdir(os.path.join(root, s, c)) for s in SPLITS for c in ("NORMAL", "PNEUMONIA")):
                return root
        return None

    @classmethod
    def fits(cls, folder: str) -> bool:
        """Whether a folder has this layout."""
        return cls._root(folder) is not None


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


class CheXpert(Dataset):
    """CheXpert as published: ``train.csv`` and ``valid.csv`` beside the folders ``train`` and ``valid``.

    Frontal PA films alone. Normal is ``No Finding`` marked 1, abnormal any of the 12 findings marked 1 (not Support
    Devices), whatever ``No Finding`` says; films that are neither (uncertain or unmentioned) are left out. ``finding``
    is ``"No Finding"``, the finding's name where it is the only one, or ``"several"``. ``valid`` becomes ``"val"``.

    Source: SPEC section 6. Raises: ValueError where files, columns or values are not as published.
    """

    def __init__(self, folder: Path) -> None:
        folder = _folder(folder)
        if not self.fits(folder):
            raise ValueError(f"{folder} has no CheXpert train.csv or valid.csv")
        records = [
            record
            for name, split in (("train.csv", "train"), ("valid.csv", "val"))
            if os.path.isfile(os.path.join(folder, name))
            for record in _read_chexpert(folder, name, split)
        ]
        super().__init__(records, folder)

    @classmethod
    def fits(cls, folder: str) -> bool:
        """Whether a folder has this layout."""
        for name in ("train.csv", "valid.csv"):
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                with open(path, encoding="utf-8-sig", errors="replace") as file:
                    if {"Path", "Frontal/Lateral", "AP/PA"} <= set(next(csv.reader(file), [])):
                        return True
        return False


class COVIDx(Dataset):
    """COVIDx (v9, CXR-2) as published: ``train.txt`` and ``test.txt`` beside the folders ``train`` and ``test``.

    Lines are ``patient filename label source``; ``normal`` is normal, ``pneumonia`` and ``COVID-19`` are abnormal.

    Source: SPEC section 6. Raises: ValueError naming the line that is not as published.
    """

    def __init__(self, folder: Path) -> None:
        folder = _folder(folder)
        if not self.fits(folder):
            raise ValueError(f"{folder} has no COVIDx train.txt beside train/ nor test.txt beside test/")
        super().__init__(
            (
                record
                for split in ("train", "test")
                if os.path.isfile(os.path.join(folder, split + ".txt"))
                for record in _read_covidx(folder, split)
            ),
            folder,
        )

    @classmethod
    def fits(cls, folder: str) -> bool:
        """Whether a folder has this layout."""
        return any(
            os.path.isfile(os.path.join(folder, split + ".txt")) and os.path.isdir(os.path.join(folder, split))
            for split in ("train", "test")
        )


def open_dataset(path: Path) -> Dataset:
    """Open a CSV list, a folder in the layout of a published data set, any folder of images, or one image.

    Raises: ValueError saying what was expected, where nothing fits; OSError where the path cannot be read.
    """
    path = os.path.abspath(os.fspath(path))
    if os.path.isfile(path):
        if path.lower().endswith(".csv"):
            return Dataset(read_csv(path), path)
        if is_image(path):
            return Dataset([Record(path)], path)
        raise ValueError(f"{path} is neither an image nor a CSV list of images")
    for kind in (ZhangLab, CheXpert, COVIDx):
        if kind.fits(_folder(path)):
            return kind(path)
    return Radiographs(path)


def iter_records(path: Path) -> Iterator[Record]:
    """Yield the images of a folder (as `Radiographs` has them), of a CSV list, or one image, never holding all.

    The order is the same every time: that of the list, or that in which the folder is walked, each folder's files by
    name and then its folders. A path that a list has twice is yielded twice.

    Raises: at the call, ValueError where there is no image and OSError where the path cannot be read; later what is
        wrong further down.
    """
    path = os.path.abspath(os.fspath(path))
    if not os.path.isfile(path):
        records = _radiographs(_folder(path))
    elif path.lower().endswith(".csv"):
        records = iter_csv(path)
    elif is_image(path):
        records = iter([Record(path)])
    else:
        raise ValueError(f"{path} is neither an image nor a CSV list of images")
    first = next(records, None)
    if first is None:
        raise ValueError(f"{path} has no image")
    return itertools.chain([first], records)


def _radiographs(folder: str) -> Iterator[Record]:
    return (Record(path, split=_split_below(folder, path)) for path in iter_images(folder))


def _folder(path: Path) -> str:
    """Return an absolute path, so that records survive a change of directory and lists lie anywhere."""
    folder = os.path.abspath(os.fspath(path))
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is no folder" if os.path.exists(folder) else f"{folder} does not exist")
    return folder


def _split_below(folder: str, path: str) -> str:
    parts = os.path.relpath(os.path.dirname(path), folder).split(os.sep)
    return next((split_from_name(part) for part in parts if split_from_name(part)), "")


def _zhanglab_patient(path: str) -> str:
    match = re.match(r"(?:NORMAL2-)?IM-\d+|person\d+", os.path.basename(path))
    return match[0] if match else ""


def _read_chexpert(folder: str, name: str, split: str) -> list[Record]:
    path = os.path.join(folder, name)
    records = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = {"Path", "Frontal/Lateral", "AP/PA", "No Finding", *_CHEXPERT_FINDINGS} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path}, line 1: columns are missing: {', '.join(sorted(missing))}")
        for row in reader:
            if row["Frontal/Lateral"] != "Frontal" or row["AP/PA"] != "PA":
                continue
            found = [finding for finding in _CHEXPERT_FINDINGS if _is_one(row[finding])]
            if not found and not _is_one(row["No Finding"]):
                continue
            # "CheXpert-v1.0-small/train/patient00001/...": the published name of the folder need not be its name here.
            match = re.search(r"(?:^|/)((?:train|valid|test)/(patient\d+)/.+)$", row["Path"])
            if not match:
                where = f"{path}, line {reader.line_num}, column Path"
                raise ValueError(f"{where}: expected .../train/patient.../..., got {row['Path']!r}")
            finding = "several" if len(found) > 1 else found[0] if found else "No Finding"
            records.append(Record(os.path.join(folder, match[1]), split, int(bool(found)), finding, match[2]))
    return records


def _is_one(cell: str | None) -> bool:
    return (cell or "").strip() in ("1", "1.0")


def _read_covidx(folder: str, split: str) -> list[Record]:
    path = os.path.join(folder, split + ".txt")
    classes = {"normal": 0, "pneumonia": 1, "COVID-19": 1}
    records = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            patient, *name, finding, _ = line.split() if len(line.split()) >= 4 else ("", "", "")
            if not name:
                raise ValueError(
                    f"{path}, line {number}: expected 'patient filename label source', got {line.strip()!r}"
                )
            if finding not in classes:
                raise ValueError(f"{path}, line {number}: label must be one of {', '.join(classes)}, got {finding!r}")
            # File names may hold spaces; the other three fields do not.
            image = os.path.join(folder, split, " ".join(name))
            records.append(Record(image, split, classes[finding], finding, patient))
    return records

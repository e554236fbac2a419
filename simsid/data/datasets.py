"""Data sets as they are published: torch `Dataset`s over a list of files."""

import csv
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import data

from simsid.arguments import require_path
from simsid.data.files import FileReader
from simsid.data.folders import excluded, is_image, iter_images, list_images, patterns
from simsid.data.images import ImageSet, load_images, stream_images
from simsid.data.preprocessing import ImageSize, Preprocessing, to_float
from simsid.data.published import read_chexpert, read_covidx
from simsid.data.records import SPLITS, Record, failure_summary, iter_csv, missing_files, read_csv, split_from_name
from simsid.errors import InputError, ReadError

Path = str | os.PathLike[str]


SAMPLES = os.path.join(os.path.dirname(os.path.dirname(__file__)), "samples", "films.csv")
"""A list of twelve radiographs of children that come with simsid, six normal and six with pneumonia (CC BY 4.0)."""


class Dataset(data.Dataset):
    """A list of images, decoded when an item is taken: a torch `Dataset` whose items are (image, label).

    Args:
        records: the images; the attribute `records` holds them as a tuple.
        name: what messages call the data set.
        preprocessing: how items, `batches` and `load` bring the images to one size and range.

    Raises:
        InputError: there is no record.
    """

    def __init__(self, records: Iterable[Record], name: str, preprocessing: Preprocessing | None = None) -> None:
        self.records = tuple(records)
        self.name = name
        self.preprocessing = preprocessing or Preprocessing()
        if not self.records:
            raise InputError(f"{name} has no image")

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}: {self._split_counts()})"

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Decode one image: float32 `[1, H, W]` in -1..1, and its label as int64, -1 where it is unknown.

        Raises:
            ReadError: the file cannot be read; the message has its path.
        """
        record = self.records[index]
        pixels = FileReader(self.preprocessing).decode(record).pixels
        return to_float(torch.from_numpy(pixels))[None], torch.tensor(-1 if record.label is None else record.label)

    def batches(self, size: int = 256) -> Iterator[Tensor]:
        """Decode all images in parallel threads and yield float32 `[b, 1, H, W]` in -1..1, `size` at a time.

        Raises:
            ReadError: a file cannot be read; its image would be missing from the results without notice.
        """
        for images, _, failures in stream_images(self.records, **self.preprocessing.to_dict(), batch_size=size):
            if failures:
                raise ReadError(failure_summary(failures, len(self)))
            yield images

    def load(self, split: str | None = None, image_size: ImageSize | None = None, **options: Any) -> ImageSet:
        """Decode the images of one split, or all, into memory.

        Args:
            split: see `select`.
            image_size: None is that of `preprocessing`.
            options: as in `load_images`; `aspect` and `intensity` are by default those of `preprocessing`.

        Raises:
            InputError: the split has no image, or no file of it can be read.
        """
        if image_size is not None:
            options["image_size"] = image_size
        return load_images(self.select(split), **{**self.preprocessing.to_dict(), **options})

    def select(self, split: str | None = None) -> list[Record]:
        """Return the records of one split (`""`: those without a split), or all.

        Raises:
            InputError: there are none.
        """
        records = [record for record in self.records if split is None or record.split == split]
        if not records:
            raise InputError(f"{self.name} has no {split!r} split; it has {self._split_counts()}")
        return records

    def missing(self, split: str | None = None) -> list[str]:
        """Return the paths of one split, or of all images, that do not exist, so that a caller can name them."""
        return missing_files(self.select(split))

    def _split_counts(self) -> str:
        counts = Counter(record.split for record in self.records)
        return ", ".join(f"{counts[name]} {name or 'without a split'}" for name in (*SPLITS, "") if counts[name])


class Radiographs(Dataset):
    """Any folder of PNG, JPEG, TIFF, BMP and DICOM images, at any depth.

    Labels are unknown: names of folders are not taken for classes. A folder named train, val (valid, validation) or
    test, in any case, gives the split.

    Args:
        exclude: shell patterns of paths below the folder to leave out, such as `"masks"` (every folder or file of this
            name), `"*_mask.png"`, or, with a slash, `"raw/*.png"` (`*` then also matches slashes); one or several.
        preprocessing: see `Dataset`.

    Raises:
        InputError: the folder does not exist, or has no image.
        OSError: the folder cannot be listed. A folder below that cannot be listed counts as an image that fails.
    """

    def __init__(
        self, folder: Path, *, exclude: str | Sequence[str] = (), preprocessing: Preprocessing | None = None
    ) -> None:
        folder = _folder(folder)
        super().__init__(_radiographs(folder, patterns(exclude)), folder, preprocessing)


class ZhangLab(Dataset):
    """Pediatric chest radiographs as published: `chest_xray/{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg`.

    Takes the folder `chest_xray` or the one that holds it; splits may be missing. `label` is 1 for PNEUMONIA;
    `patient` is the part of the file name that numbers the person (`IM-0115`, `NORMAL2-IM-0115`, which is another
    person, and `person1000`).

    Source: Kermany, Zhang, Goldbaum, Labeled Optical Coherence Tomography (OCT) and Chest X-Ray Images, 2018.

    Raises:
        InputError: the folder has another layout.
    """

    def __init__(self, folder: Path, *, preprocessing: Preprocessing | None = None) -> None:
        folder = _folder(folder)
        root = self._root(folder)
        if root is None:
            raise InputError(f"{folder} has no train, val or test folder with NORMAL or PNEUMONIA in it")
        super().__init__(
            (
                Record(path, split, label, finding, _zhanglab_patient(path))
                for split in SPLITS
                for label, finding in enumerate(("NORMAL", "PNEUMONIA"))
                if os.path.isdir(os.path.join(root, split, finding))
                for path in list_images(os.path.join(root, split, finding))
            ),
            folder,
            preprocessing,
        )

    @staticmethod
    def _root(folder: str) -> str | None:
        for root in (folder, os.path.join(folder, "chest_xray")):
            if any(os.path.isdir(os.path.join(root, s, c)) for s in SPLITS for c in ("NORMAL", "PNEUMONIA")):
                return root
        return None

    @classmethod
    def fits(cls, folder: str) -> bool:
        """Return whether a folder has this layout."""
        return cls._root(folder) is not None


class CheXpert(Dataset):
    """CheXpert as published: `train.csv` and `valid.csv` beside the folders `train` and `valid`.

    Only frontal PA radiographs are taken. Abnormal is any of the 12 findings marked 1 (Support Devices is not one of
    them), whatever `No Finding` is; normal is `No Finding` marked 1 without such a finding. A finding marked -1
    (uncertain) counts as not marked, as do 0 and an empty cell: such a radiograph is abnormal or normal by its other
    marks, and left out where it has none; a warning says how many there are. `finding` is `"No Finding"`, or the names
    of all findings, as in `"Edema; Fracture"`. `valid` becomes split `"val"`.

    Source: Irvin et al., CheXpert, arXiv 1901.07031.

    Raises:
        InputError: files, columns or values are not as published.
    """

    def __init__(self, folder: Path, *, preprocessing: Preprocessing | None = None) -> None:
        folder = _folder(folder)
        if not self.fits(folder):
            raise InputError(f"{folder} has no CheXpert train.csv or valid.csv")
        records = [
            record
            for name, split in (("train.csv", "train"), ("valid.csv", "val"))
            if os.path.isfile(os.path.join(folder, name))
            for record in read_chexpert(folder, name, split)
        ]
        super().__init__(records, folder, preprocessing)

    @classmethod
    def fits(cls, folder: str) -> bool:
        """Return whether a folder has this layout."""
        for name in ("train.csv", "valid.csv"):
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                with open(path, encoding="utf-8-sig", errors="replace") as file:
                    if {"Path", "Frontal/Lateral", "AP/PA"} <= set(next(csv.reader(file), [])):
                        return True
        return False


class COVIDx(Dataset):
    """COVIDx (v9, CXR-2) as published: `train.txt` and `test.txt` beside the folders `train` and `test`.

    Lines are `patient filename label source`; `normal` is normal, `pneumonia` and `COVID-19` are abnormal.

    Source: Wang, Lin, Wong, COVID-Net, Scientific Reports 2020.

    Raises:
        InputError: names the line that is not as published.
    """

    def __init__(self, folder: Path, *, preprocessing: Preprocessing | None = None) -> None:
        folder = _folder(folder)
        if not self.fits(folder):
            raise InputError(f"{folder} has no COVIDx train.txt beside train/ nor test.txt beside test/")
        super().__init__(
            (
                record
                for split in ("train", "test")
                if os.path.isfile(os.path.join(folder, split + ".txt"))
                for record in read_covidx(folder, split)
            ),
            folder,
            preprocessing,
        )

    @classmethod
    def fits(cls, folder: str) -> bool:
        """Return whether a folder has this layout."""
        return any(
            os.path.isfile(os.path.join(folder, split + ".txt")) and os.path.isdir(os.path.join(folder, split))
            for split in ("train", "test")
        )


def open_dataset(
    path: Path, *, exclude: str | Sequence[str] = (), preprocessing: Preprocessing | None = None
) -> Dataset:
    """Open a CSV list, a folder in the layout of a published data set, any folder of images, or one image.

    Args:
        exclude: shell patterns of paths to leave out, relative to the folder (of the list); see `Radiographs`.
        preprocessing: see `Dataset`.

    Raises:
        InputError: nothing fits; the message says what was expected.
        OSError: the path cannot be read.
    """
    path = os.path.abspath(require_path("path", path))
    exclude = patterns(exclude)
    if os.path.isfile(path):
        if path.lower().endswith(".csv"):
            return Dataset(_kept(read_csv(path), os.path.dirname(path), exclude), path, preprocessing)
        if is_image(path):
            return Dataset([Record(path)], path, preprocessing)
        raise InputError(f"{path} is neither an image nor a CSV list of images")
    for kind in (ZhangLab, CheXpert, COVIDx):
        if kind.fits(_folder(path)):
            dataset = kind(path, preprocessing=preprocessing)
            dataset.records = tuple(_kept(dataset.records, path, exclude))
            if not dataset.records:
                raise InputError(f"{path} has no image that exclude leaves")
            return dataset
    return Radiographs(path, exclude=exclude, preprocessing=preprocessing)


def iter_records(path: Path, *, exclude: str | Sequence[str] = ()) -> Iterator[Record]:
    """Yield the images of a folder (as `Radiographs` has them), of a CSV list, or one image, in bounded memory.

    The order is the same every time: that of the list, or that in which the folder is walked, each folder's files by
    name and then its folders. A path that a list has twice is yielded twice. A folder below that cannot be listed is
    yielded as a record, which fails to load with the reason.

    Args:
        exclude: see `open_dataset`.

    Raises:
        InputError: at the call, there is no image; while iterating, a line of the list cannot be used.
        OSError: at the call, the path cannot be read.
    """
    path = os.path.abspath(require_path("path", path))
    exclude = patterns(exclude)
    if not os.path.isfile(path):
        records = _radiographs(_folder(path), exclude)
    elif path.lower().endswith(".csv"):
        records = _kept(iter_csv(path), os.path.dirname(path), exclude)
    elif is_image(path):
        records = iter([Record(path)])
    else:
        raise InputError(f"{path} is neither an image nor a CSV list of images")
    first = next(records, None)
    if first is None:
        raise InputError(f"{path} has no image")
    return itertools.chain([first], records)


def _radiographs(folder: str, exclude: Sequence[str]) -> Iterator[Record]:
    return (Record(path, split=_split_below(folder, path)) for path in iter_images(folder, exclude))


def _kept(records: Iterable[Record], folder: str, exclude: Sequence[str]) -> Iterator[Record]:
    return (record for record in records if not (exclude and excluded(os.path.relpath(record.path, folder), exclude)))


def _folder(path: Path) -> str:
    """Return an absolute path, so that records stay valid after a change of the working directory."""
    folder = os.path.abspath(require_path("folder", path))
    if not os.path.isdir(folder):
        raise InputError(f"{folder} is not a folder" if os.path.exists(folder) else f"{folder} does not exist")
    return folder


def _split_below(folder: str, path: str) -> str:
    parts = os.path.relpath(os.path.dirname(path), folder).split(os.sep)
    return next((split_from_name(part) for part in parts if split_from_name(part)), "")


def _zhanglab_patient(path: str) -> str:
    match = re.match(r"(?:NORMAL2-)?IM-\d+|person\d+", os.path.basename(path))
    return match[0] if match else ""

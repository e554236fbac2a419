"""A labelled list of files: the one currency of every data set."""

import csv
import difflib
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

COLUMNS = ("path", "label", "split", "patient", "finding")
SPLITS = ("train", "val", "test")

_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_LABELS = {"": None, "0": 0, "1": 1, "0.0": 0, "1.0": 1, "normal": 0, "abnormal": 1}


@dataclass(frozen=True)
class Record:
    """One image of a data set.

    Arguments:
        path: the file, absolute or as given; a name such as ``digits/test/00012`` for an image that is no file.
        split: ``"train"``, ``"val"``, ``"test"``, or ``""`` where the data set does not say.
        label: 0 normal, 1 abnormal, ``None`` unknown.
        finding: the class the data set gives it, such as ``"NORMAL"``, ``"PNEUMONIA"``, ``"misordered"``.
        patient: an identifier that is equal for two images of one patient; ``""`` unknown.
    """

    path: str
    split: str = ""
    label: int | None = None
    finding: str = ""
    patient: str = ""


@dataclass(frozen=True)
class Failure:
    """A file that could not be read, and why, in one sentence."""

    path: str
    reason: str


def split_from_name(name: str) -> str:
    """Return the split that a folder of this name stands for (``"Validation"`` is ``"val"``), or ``""``."""
    return _SPLIT_NAMES.get(name.lower(), "")


def read_csv(path: str | os.PathLike[str]) -> list[Record]:
    """Read a list of images from a CSV file with the columns path, label, split, patient and finding.

    Only ``path`` is required; a relative one starts at the CSV file's folder. ``label`` is 0 or 1, normal or abnormal,
    or empty; ``split`` is train, val (valid, validation), test, or empty. Other columns are ignored, unless their name
    looks like a misspelt one of these. The text is UTF-8; paths may hold other bytes, which are taken as they are.

    Returns: the records in the order of the file, with absolute paths.
    Raises: ValueError naming line and column; OSError where the file cannot be opened.
    """
    path = os.fspath(path)
    records: list[Record] = []
    line_of: dict[str, int] = {}
    for line, record in _numbered_rows(path):
        if record.path in line_of:
            raise ValueError(
                f"{path}, line {line}, column path: {record.path!r} is already on line {line_of[record.path]}"
            )
        line_of[record.path] = line
        records.append(record)
    return records


def iter_csv(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Yield the records that `read_csv` returns, one at a time and none of them kept.

    A path that is listed twice is yielded twice. Raises: as `read_csv`, where the iterator comes to it.
    """
    return (record for _, record in _numbered_rows(os.fspath(path)))


def _numbered_rows(path: str) -> Iterator[tuple[int, Record]]:
    """Yield each record with its line."""
    folder = os.path.dirname(os.path.abspath(path))
    empty = True
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = _check_header(path, next(reader, []))
            for row in reader:
                if any(cell.strip() for cell in row):
                    yield reader.line_num, _parse_row(f"{path}, line {reader.line_num}", header, row, folder)
                    empty = False
        except csv.Error as error:
            # Python 3.10 stops at the zero bytes of UTF-16; later versions go on and find its header to be no text.
            reason = "not UTF-8 text" if "NUL" in str(error) else error
            raise ValueError(f"{path}, line {reader.line_num}: {reason}") from None
    if empty:
        raise ValueError(f"{path} lists no image")


def _check_header(path: str, names: Sequence[str]) -> list[str]:
    header = [name.strip().lower() for name in names]
    if not all(map(_is_text, header)):
        raise ValueError(f"{path}, line 1: not UTF-8 text")
    if "path" not in header:
        raise ValueError(
            f"{path}, line 1: no column 'path' among {header}; the file must be comma-separated with a header such as "
            f"{','.join(COLUMNS)}"
        )
    for name in COLUMNS:
        if header.count(name) > 1:
            raise ValueError(f"{path}, line 1: column {name!r} appears {header.count(name)} times")
    for name in header:
        meant = difflib.get_close_matches(name, [column for column in COLUMNS if column not in header], 1, 0.75)
        # A misspelt "label" read as "no labels" would train on anomalies without a word.
        if name not in COLUMNS and meant:
            raise ValueError(f"{path}, line 1: unknown column {name!r}, did you mean {meant[0]!r}?")
    return header


def _parse_row(where: str, header: Sequence[str], row: Sequence[str], folder: str) -> Record:
    if len(row) != len(header):
        raise ValueError(f"{where}: {len(row)} cells where the header has {len(header)} columns")
    cells = {name: cell.strip() for name, cell in zip(header, row)}
    if not cells["path"]:
        raise ValueError(f"{where}, column path: empty")
    for name in COLUMNS[1:]:
        if not _is_text(cells.get(name, "")):
            raise ValueError(f"{where}, column {name}: not UTF-8 text")
    label = cells.get("label", "").lower()
    if label not in _LABELS:
        raise ValueError(f"{where}, column label: expected 0, 1, normal, abnormal or nothing, got {label!r}")
    split = cells.get("split", "")
    if split and not split_from_name(split):
        raise ValueError(f"{where}, column split: expected train, val, test or nothing, got {split!r}")
    return Record(
        path=os.path.normpath(os.path.join(folder, cells["path"])),
        split=split_from_name(split),
        label=_LABELS[label],
        finding=cells.get("finding", ""),
        patient=cells.get("patient", ""),
    )


def _is_text(cell: str) -> bool:
    """Whether a cell was UTF-8; other bytes are read as lone surrogates, which only the name of a file may hold."""
    return not any("\ud800" <= character <= "\udfff" for character in cell)


def write_csv(
    path: str | os.PathLike[str], records: Iterable[Record], extra: dict[str, Sequence[object]] | None = None
) -> None:
    """Write records as a CSV file that `read_csv` reads; paths are written as they stand.

    Arguments:
        extra: further columns by name, one value a record; ``None`` becomes an empty cell.
    Raises: ValueError where a column of `extra` has another length or the name of a column of its own.
    """
    records = list(records)
    extra = extra or {}
    for name, values in extra.items():
        if name in COLUMNS:
            raise ValueError(f"extra column {name!r} is already a column of the list")
        if len(values) != len(records):
            raise ValueError(f"extra column {name!r} has {len(values)} values for {len(records)} records")
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, *extra])
        for i, record in enumerate(records):
            cells = [getattr(record, name) for name in COLUMNS]
            writer.writerow([*cells, *(values[i] for values in extra.values())])


def split_by_patient(records: Iterable[Record], val_share: float = 0.1, seed: int = 0) -> list[Record]:
    """Divide records that name no split into ``"train"`` and ``"val"``, a patient's images on one side.

    The draw depends on the patients' names (the path below the records' common folder where the patient is unknown),
    the labels and `seed`; not on the order of the records nor on where the folder lies. Each class gives `val_share` of
    its images to ``"val"``, rounded to whole patients, at least one on each side where there are two. Records that say
    a split keep it, and a patient who is in one already stays in it.

    Arguments:
        val_share: share of the images that goes to ``"val"``, strictly between 0 and 1.
    Returns: the records in the order given.
    Raises: ValueError for a share outside (0, 1).
    """
    if not 0 < val_share < 1:
        raise ValueError(f"val_share must lie strictly between 0 and 1, got {val_share}")
    records = list(records)
    taken = {record.patient: record.split for record in records if record.patient and record.split}
    open_records = [record for record in records if not record.split and record.patient not in taken]
    folder = _common_folder(open_records)
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in open_records:
        groups[_group(record, folder)].append(record)
    strata: dict[int, list[str]] = defaultdict(list)
    for name, members in groups.items():
        # A patient with normal and abnormal films counts with the abnormal ones.
        strata[max(-1 if record.label is None else record.label for record in members)].append(name)

    split_of: dict[str, str] = {}
    for names in strata.values():
        names.sort(key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
        wanted = val_share * sum(len(groups[name]) for name in names)
        given = 0
        for place, name in enumerate(names):
            size = len(groups[name])
            first, last = place == 0, place == len(names) - 1
            # Half a patient over is rounded down, so the share is met to the nearest whole patient.
            to_val = len(names) > 1 and not last and (first or given + size / 2 <= wanted)
            split_of[name] = "val" if to_val else "train"
            given += size if to_val else 0
    return [
        record if record.split else replace(record, split=taken.get(record.patient) or split_of[_group(record, folder)])
        for record in records
    ]


def _group(record: Record, folder: str) -> str:
    """Name what must stay together: the patient, or the image alone."""
    if record.patient:
        return "patient:" + record.patient
    name = os.path.relpath(record.path, folder) if folder else record.path
    return "image:" + name.replace(os.sep, "/")


def _common_folder(records: Sequence[Record]) -> str:
    try:
        return os.path.commonpath([os.path.dirname(record.path) for record in records if not record.patient])
    except ValueError:  # none, or absolute and relative paths mixed
        return ""

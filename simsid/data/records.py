"""A labeled list of files, which every data set consists of, and its CSV format."""

import csv
import difflib
import os
import pathlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from simsid import checkpoint
from simsid.errors import InputError, printable

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

    Args:
        path: the file, absolute or as given; a name such as `digits/test/00012` for an image that is not a file.
        split: `"train"`, `"val"`, `"test"`, or `""` where the data set does not name one.
        label: 0 normal, 1 abnormal, None unknown.
        finding: the class that the data set gives it, such as `"NORMAL"`, `"PNEUMONIA"`, `"misordered"`; several are
            separated by semicolons, as in `"Edema; Fracture"`.
        patient: an identifier that is equal for two images of one patient; `""` unknown.
        provenance: how the file was decoded, once it is: format, size, bit depth, which LUT or window, polarity. It is
            not a column of lists.
    """

    path: str
    split: str = ""
    label: int | None = None
    finding: str = ""
    patient: str = ""
    provenance: Mapping[str, str | int | float] = field(default_factory=dict, compare=False, repr=False)

    @property
    def for_processing(self) -> bool:
        """Whether the file is stored FOR PROCESSING, so that its gray values are not those meant for display."""
        return self.provenance.get("presentation_intent") == "FOR PROCESSING"


@dataclass(frozen=True)
class Failure:
    """A file that could not be read and the reason, one sentence; `sha256` is `""` where no byte could be read."""

    path: str
    reason: str
    sha256: str = field(default="", compare=False)


def failure_summary(failures: Sequence[Failure], total: int) -> str:
    """Return one sentence that counts the files that could not be read, and names the first with its reason."""
    first = f"{printable(failures[0].path)}: {failures[0].reason}"
    if len(failures) == total:
        return f"none of the {total} files could be read; the first, {first}"
    return f"{len(failures)} of {total} files could not be read; the first, {first}"


def missing_files(records: Iterable[Record]) -> list[str]:
    """Return the paths of records that do not exist, such as those of a list made on another machine."""
    return [record.path for record in records if not os.path.lexists(record.path)]


def split_from_name(name: str) -> str:
    """Return the split that a folder of this name stands for (`"Validation"` is `"val"`), or `""`."""
    return _SPLIT_NAMES.get(name.lower(), "")


def read_csv(path: str | os.PathLike[str]) -> list[Record]:
    """Read a list of images from a CSV file with the columns path, label, split, patient and finding.

    Only `path` is required; a relative one starts at the CSV file's folder. `label` is 0 or 1, normal or abnormal, or
    empty; `split` is train, val (valid, validation), test, or empty. Other columns are ignored with a warning that
    names them; a column whose name looks like a misspelled one of these is refused. The text is UTF-8; paths may hold
    other bytes, which are kept. Cells that `checkpoint.csv_writer` protected against formulas are restored.

    Returns:
        The records in the order of the file, with absolute paths.

    Raises:
        InputError: the list cannot be used; the message names line and column.
        OSError: the file cannot be opened.

    Warns:
        UserWarning: names the columns that are ignored.
    """
    path = os.fspath(path)
    records: list[Record] = []
    line_of: dict[str, int] = {}
    for line, record in _numbered_rows(path):
        if record.path in line_of:
            raise InputError(
                f"{path}, line {line}, column path: {record.path!r} is already on line {line_of[record.path]}"
            )
        line_of[record.path] = line
        records.append(record)
    return records


def iter_csv(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Yield the records that `read_csv` returns, one at a time in bounded memory.

    A path that is listed twice is yielded twice. Errors are those of `read_csv`, raised when the iterator reaches the
    line.
    """
    return (record for _, record in _numbered_rows(os.fspath(path)))


def write_csv(
    path: str | os.PathLike[str], records: Iterable[Record], extra: dict[str, Sequence[object]] | None = None
) -> None:
    """Write records atomically as a CSV file that `read_csv` reads; paths are written as they are.

    Args:
        extra: further columns by name, one value per record; None becomes an empty cell.

    Raises:
        InputError: a column of `extra` has another length, or the name of a column of the list.
    """
    records = list(records)
    extra = extra or {}
    for name, values in extra.items():
        if name in COLUMNS:
            raise InputError(f"extra column {name!r} is already a column of the list")
        if len(values) != len(records):
            raise InputError(f"extra column {name!r} has {len(values)} values for {len(records)} records")
    with checkpoint.csv_writer(pathlib.Path(path), [*COLUMNS, *extra]) as write:
        for i, record in enumerate(records):
            write([*(getattr(record, name) for name in COLUMNS), *(values[i] for values in extra.values())])


def _numbered_rows(path: str) -> Iterator[tuple[int, Record]]:
    """Yield each record with its line."""
    folder = os.path.dirname(os.path.abspath(path))
    empty = True
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        # Spaces after a comma are dropped; those inside quotes belong to the cell.
        reader = csv.reader(file, strict=True, skipinitialspace=True)
        try:
            header = _check_header(path, next(reader, []))
            for row in reader:
                if any(cell.strip() for cell in row):
                    yield reader.line_num, _parse_row(f"{path}, line {reader.line_num}", header, row, folder)
                    empty = False
        except csv.Error as error:
            # Python 3.10 stops at the zero bytes of UTF-16; later versions reach the header check.
            reason = "not UTF-8 text" if "NUL" in str(error) else error
            raise InputError(f"{path}, line {reader.line_num}: {reason}") from None
    if empty:
        raise InputError(f"{path} lists no image")


def _check_header(path: str, names: Sequence[str]) -> list[str]:
    header = [name.strip().lower() for name in names]
    if not all(map(_is_text, header)):
        raise InputError(f"{path}, line 1: not UTF-8 text")
    if "path" not in header:
        raise InputError(
            f"{path}, line 1: no column 'path' among {header}; the file must be comma-separated with a header such as "
            f"{','.join(COLUMNS)}"
        )
    for name in COLUMNS:
        if header.count(name) > 1:
            raise InputError(f"{path}, line 1: column {name!r} appears {header.count(name)} times")
    for name in header:
        meant = _misspelled(name, [column for column in COLUMNS if column not in header])
        # A misspelled "label" read as "no labels" would train on anomalies without notice.
        if name not in COLUMNS and meant:
            raise InputError(f"{path}, line 1: unknown column {name!r}, did you mean {meant!r}?")
    ignored = [repr(name) for name in header if name not in COLUMNS]
    if ignored:
        warnings.warn(
            f"{path}: ignored column{'s' if len(ignored) > 1 else ''} {', '.join(ignored)}; the columns read are "
            f"{', '.join(COLUMNS)}",
            UserWarning,
            stacklevel=2,
        )
    return header


def _misspelled(name: str, columns: Sequence[str]) -> str:
    """Return the column that a name is a misspelling of, or `""`; "patient age" is not one of "patient"."""
    letters = re.sub(r"[\W_]", "", name)
    if "patient" in columns and letters in ("patientid", "patientidentifier"):
        return "patient"
    similar = [column for column in columns if abs(len(column) - len(letters)) <= 1]
    return next(iter(difflib.get_close_matches(letters, similar, 1, 0.75)), "")


def _parse_row(where: str, header: Sequence[str], row: Sequence[str], folder: str) -> Record:
    if len(row) != len(header):
        raise InputError(f"{where}: {len(row)} cells where the header has {len(header)} columns")
    cells = dict(zip(header, row))
    for name in COLUMNS[1:]:
        cells[name] = checkpoint.unescape_cell(cells.get(name, "").strip())
        if not _is_text(cells[name]):
            raise InputError(f"{where}, column {name}: not UTF-8 text")
    if not cells["path"].strip():
        raise InputError(f"{where}, column path: empty")
    label = cells["label"].lower()
    if label not in _LABELS:
        raise InputError(f"{where}, column label: expected 0, 1, normal, abnormal or nothing, got {label!r}")
    if cells["split"] and not split_from_name(cells["split"]):
        raise InputError(f"{where}, column split: expected train, val, test or nothing, got {cells['split']!r}")
    return Record(
        path=_path_of(cells["path"], folder),
        split=split_from_name(cells["split"]),
        label=_LABELS[label],
        finding=cells["finding"],
        patient=cells["patient"],
    )


def _path_of(cell: str, folder: str) -> str:
    """Return the absolute path that a cell names."""
    path = checkpoint.unescape_cell(cell)
    # White space around a path is almost always a slip of whoever wrote the list, but file names may have it.
    if path != path.strip() and not os.path.lexists(os.path.join(folder, _as_file_name(path))):
        path = checkpoint.unescape_cell(cell.strip())
    return os.path.normpath(os.path.join(folder, _as_file_name(path)))


def _as_file_name(text: str) -> str:
    """Return UTF-8 text as Python names files: in an ASCII locale the bytes of an umlaut are lone surrogates."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape")) if os.name == "posix" else text


def _is_text(cell: str) -> bool:
    """Return whether a cell was UTF-8; other bytes are read as lone surrogates, which only file names may hold."""
    return not any("\ud800" <= character <= "\udfff" for character in cell)

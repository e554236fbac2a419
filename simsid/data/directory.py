"""Reads TIFF directories, in a TIFF file or in EXIF data, without loading the values of their tags."""

import contextlib
import io
import struct
from dataclasses import dataclass, field
from typing import BinaryIO

from simsid.errors import ReadError

# Directories that are counted; a chain of 100,000 takes a decoder minutes.
MAX_PAGES = 10
# Values of one directory. Decoders load all of them, and 65,535 tags may point to the same megabytes.
MAX_VALUE_BYTES = 64 * 2**20

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
COMPRESSION, ORIENTATION, TILE_WIDTH, TILE_LENGTH = 259, 274, 322, 323
# EXIF, GPS and interoperability, which Pillow loads with the image.
_SUBDIRECTORIES = frozenset([34665, 34853, 40965])

Entry = tuple[int, int, int, bytes]  # tag, type, count, value or its offset


@dataclass(frozen=True)
class Directory:
    """The first directory of a file.

    Args:
        numbers: tags whose value is one unsigned integer.
        value_bytes: bytes of all its values together, those of the EXIF and GPS directories included.
        pages: directories in the chain, counted up to `MAX_PAGES` + 1.
    """

    numbers: dict[int, int] = field(default_factory=dict)
    value_bytes: int = 0
    pages: int = 0


def read_directory(file: BinaryIO) -> Directory:
    """Read the first directory of TIFF or BigTIFF data and count the others.

    Raises:
        ReadError: the header or the first directory is cut off.
    """
    head = file.read(16)
    layout = _Layout("<" if head[:2] == b"II" else ">", head[2:4] in (b"+\0", b"\0+"))
    try:
        first, following = layout.entries(file, layout.offset(head, 8 if layout.big else 4))
    except (struct.error, OverflowError, OSError, ValueError):
        raise ReadError("the TIFF directory is cut off") from None
    numbers = layout.numbers(first)
    size = layout.value_bytes(first)
    pages, seen = 1, set()
    # A following directory that cannot be read ends the chain, as it does for a decoder.
    with contextlib.suppress(struct.error, OverflowError, OSError, ValueError):
        while following and following not in seen and pages <= MAX_PAGES:
            seen.add(following)
            _, following = layout.entries(file, following)
            pages += 1
    for tag in _SUBDIRECTORIES & numbers.keys():
        with contextlib.suppress(struct.error, OverflowError, OSError, ValueError):
            size += layout.value_bytes(layout.entries(file, numbers[tag])[0])
    return Directory(numbers, size, pages)


class _Layout:
    """Byte order, and the wider fields of BigTIFF."""

    def __init__(self, order: str, big: bool) -> None:
        self.big = big
        self._order = order
        self._count = struct.Struct(order + ("Q" if big else "H"))
        self._entry = struct.Struct(order + ("HHQ8s" if big else "HHI4s"))
        self._offset = struct.Struct(order + ("Q" if big else "I"))

    def offset(self, data: bytes, position: int) -> int:
        return self._offset.unpack_from(data, position)[0]

    def entries(self, file: BinaryIO, position: int) -> tuple[list[Entry], int]:
        """Return the entries of the directory at `position`, and where the next one lies (0 for none)."""
        file.seek(position)
        (count,) = self._count.unpack(file.read(self._count.size))
        if count > 2**16:
            raise ValueError
        data = file.read(count * self._entry.size)
        entries = [self._entry.unpack_from(data, self._entry.size * i) for i in range(count)]
        following = file.read(self._offset.size)
        # A file that ends with its directory has no room for the offset.
        return entries, self.offset(following, 0) if len(following) == self._offset.size else 0

    def numbers(self, entries: list[Entry]) -> dict[int, int]:
        return {
            tag: struct.unpack_from(self._order + _INTEGERS[kind], value)[0]
            for tag, kind, count, value in entries
            if count == 1 and kind in _INTEGERS and _SIZES[kind] <= len(value)
        }

    @staticmethod
    def value_bytes(entries: list[Entry]) -> int:
        return sum(_SIZES.get(kind, 1) * count for _, kind, count, _ in entries)


def exif_orientation(exif: bytes) -> int:
    """Return the orientation, 1 to 8, in EXIF data; 1 where it is absent or the data is damaged."""
    if exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    try:
        value = read_directory(io.BytesIO(exif)).numbers.get(ORIENTATION, 1)
    except ReadError:
        return 1
    return value if 1 <= value <= 8 else 1

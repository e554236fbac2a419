"""Reads one image file, whatever its format, into gray values of full depth."""

import contextlib
import os
import stat
from typing import BinaryIO, Literal

from simsid.data.decoded import MAX_PIXELS, DecodedImage, one_sentence
from simsid.data.quiet import quiet
from simsid.data.raster import read_raster
from simsid.errors import InputTypeError, ReadError

__all__ = ["MAX_PIXELS", "DecodedImage", "identify", "identify_file", "one_sentence", "read_image"]

_SUPPORTED = "PNG, JPEG, TIFF, BMP or DICOM"
_OTHER_KINDS = (
    (b"GIF8", "GIF"),
    (b"%PDF", "PDF"),
    (b"PK\x03\x04", "ZIP"),
    (b"\x1f\x8b", "gzip"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
)


def read_image(path: str | os.PathLike[str] | BinaryIO, *, max_pixels: int = MAX_PIXELS) -> DecodedImage:
    """Read a PNG, JPEG, TIFF, BMP or DICOM file, recognized by its content and not by its name.

    16-bit grayscale keeps its depth. EXIF orientation is applied. Color becomes luma (ITU-R 601), which leaves gray
    stored as color unchanged; transparent pixels become black. Refused, each with its reason: TIFF and PNG files of
    several pages, color of 16 bits a channel (Pillow would drop the lower 8), CIELAB, color and multi-frame DICOM,
    images whose pixels all have one value.

    Decoding one file holds at most `decoded.MAX_BYTES` (480 MB), its result included, and all threads of the process
    together at most four times that: a reader waits until there is room. A larger `max_pixels` raises the limit of a
    file in proportion.

    Args:
        path: a regular file's path, or a binary file that can seek and is at its beginning; it stays open.
        max_pixels: rows times columns that are accepted, checked from the header before anything is decoded.

    Raises:
        ReadError: whatever keeps the file from being read; the text is one sentence without the path.
    """
    if not isinstance(path, (str, os.PathLike)) and not hasattr(path, "read"):
        raise InputTypeError(f"path must be a path or a binary file, got an object of type {type(path).__name__}")
    with quiet():
        try:
            with _open(path) if isinstance(path, (str, os.PathLike)) else contextlib.nullcontext(path) as file:
                head = file.read(132)
                kind = identify(head)
                file.seek(0)
                if kind == "DICOM":
                    # Imported here: most users read no DICOM, and pydicom is slow to import.
                    from simsid.data.dicom import read_dicom

                    return read_dicom(file, max_pixels)
                if not kind:
                    raise ReadError(_unknown(head))
                return read_raster(file, kind, max_pixels)
        except OSError as error:
            raise ReadError(f"the file cannot be read: {error.strerror or one_sentence(error)}") from error
        except MemoryError as error:
            raise ReadError("there is not enough memory to decode the image") from error


def identify(head: bytes) -> str:
    """Name the format from a file's first 132 bytes: one of `DecodedImage.format`, or `""`."""
    if head[128:132] == b"DICM":
        return "DICOM"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    # Bytes 6 to 9 of a bitmap are reserved and zero in practice; two letters alone also begin many texts.
    if head.startswith(b"BM") and head[6:10] == b"\0\0\0\0":
        return "BMP"
    return "DICOM" if _starts_like_dicom(head) else ""


def _starts_like_dicom(head: bytes) -> bool:
    """Return whether a file without DICOM's preamble begins with an element of group 2 or 8, in either byte order."""
    if len(head) < 8 or head[:2] not in (b"\2\0", b"\x08\0", b"\0\2", b"\0\x08"):
        return False
    order: Literal["little", "big"] = "little" if head[1] == 0 else "big"
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    # The first elements are short: group lengths, character sets, UIDs.
    return explicit or int.from_bytes(head[4:8], order) <= 256


def identify_file(path: str | os.PathLike[str]) -> str:
    """Name the format of a file as `identify` does; `""` also where it cannot be opened."""
    try:
        with _open(path) as file:
            return identify(file.read(132))
    except (OSError, ReadError):
        return ""


def _open(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file that is not empty; a pipe or a device would block for ever."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise ReadError("the path is a folder, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise ReadError("the path is not a regular file")
    if status.st_size == 0:
        raise ReadError("the file is empty")
    return open(path, "rb")


def _unknown(head: bytes) -> str:
    kind = next((name for magic, name in _OTHER_KINDS if head.startswith(magic)), "")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        kind = "WebP"
    return f"the file is not a {_SUPPORTED} image" + (f" but {kind}" if kind else "")

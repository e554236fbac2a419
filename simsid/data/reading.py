"""Reads one image file, whatever its kind, into grey values of full depth."""

import contextlib
import logging
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from simsid.errors import ReadError

# Below Pillow's own limit (179 million, an error there), so that one rule speaks for every format. A 35 x 43 cm film
# scanned at 50 micrometres has 60 million pixels.
MAX_PIXELS = 100_000_000

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_SUPPORTED = "PNG, JPEG, TIFF, BMP or DICOM"
_OTHER_KINDS = (
    (b"GIF8", "GIF"),
    (b"%PDF", "PDF"),
    (b"PK\x03\x04", "ZIP"),
    (b"\x1f\x8b", "gzip"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
)
# EXIF orientations 1 to 8 as (transpose, flip rows, flip columns), applied in that order.
_ORIENTATIONS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


@dataclass(frozen=True)
class DecodedImage:
    """Grey values of one image, upright, before any change of size or of depth.

    Arguments:
        pixels: ``[H, W]``, uint8, uint16 or float32, finite; larger is brighter.
        declared: the values that stand for black and white, from the file's bit depth or its window; ``None`` where the
            file declares none (32-bit and floating-point samples).
        for_display: whether `declared` is the range meant for looking at: 8 bits, or a DICOM window or VOI LUT.
        bits: bits of a sample that the file stores.
        format: ``"PNG"``, ``"JPEG"``, ``"TIFF"``, ``"BMP"`` or ``"DICOM"``.
        padding: ``[H, W]`` bool, pixels that belong to no image (DICOM's Pixel Padding Value); ``None`` for none.
    """

    pixels: np.ndarray
    declared: tuple[float, float] | None
    for_display: bool
    bits: int
    format: str
    padding: np.ndarray | None = field(default=None, repr=False)


def read_image(path: str | os.PathLike[str] | BinaryIO, *, max_pixels: int = MAX_PIXELS) -> DecodedImage:
    """Read a PNG, JPEG, TIFF, BMP or DICOM file, known by its content and not by its name.

    16-bit greyscale keeps its depth. EXIF orientation is applied. Colour becomes luma (ITU-R 601), which leaves grey
    stored as colour unchanged; transparent pixels are laid on black. Refused, each with its reason: TIFF and PNG files
    of several pages, colour of 16 bits a channel (Pillow would drop the lower 8), CIELAB, colour and multi-frame DICOM.

    Arguments:
        path: a path, or a binary file that can seek and stands at its beginning; it stays open.
        max_pixels: rows times columns that are accepted, checked from the header before anything is decoded.
    Raises: ReadError, whose text is one sentence, for whatever keeps the file from being read.
    """
    with _quiet():
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
                return _read_with_pillow(file, kind, max_pixels)
        except OSError as error:
            raise ReadError(f"the file cannot be read: {error.strerror or one_sentence(error)}") from error
        except MemoryError as error:
            raise ReadError("there is not enough memory to decode the image") from error


def identify(head: bytes) -> str:
    """Name the format from a file's first 132 bytes: one of `DecodedImage.format`, or ``""``."""
    if head[128:132] == b"DICM":
        return "DICOM"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    # Bytes 6 to 9 of a bitmap are reserved and zero in practice; two letters alone would take text for one.
    if head.startswith(b"BM") and head[6:10] == b"\0\0\0\0":
        return "BMP"
    return "DICOM" if _starts_like_dicom(head) else ""


def _starts_like_dicom(head: bytes) -> bool:
    """Whether a file without DICOM's preamble begins with an element of group 2 or 8, in either byte order."""
    if len(head) < 8 or head[:2] not in (b"\2\0", b"\x08\0", b"\0\2", b"\0\x08"):
        return False
    order = "little" if head[1] == 0 else "big"
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    # The first elements are short: group lengths, character sets, UIDs.
    return explicit or int.from_bytes(head[4:8], order) <= 256


def identify_file(path: str | os.PathLike[str]) -> str:
    """Name the format of a file as `identify` does; ``""`` also where it cannot be opened."""
    try:
        with _open(path) as file:
            return identify(file.read(132))
    except (OSError, ReadError):
        return ""


def one_sentence(error: BaseException) -> str:
    """Return an exception's message as one line of at most 200 characters, its class where it has none."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


def check_size(rows: int, columns: int, max_pixels: int) -> None:
    """Raise ReadError unless an image of this size may be decoded."""
    if rows < 1 or columns < 1:
        raise ReadError(f"the header gives no size: {columns} x {rows} pixels")
    if rows * columns > max_pixels:
        raise ReadError(
            f"the header says {columns} x {rows} pixels, more than the {max_pixels / 1e6:g} million allowed"
        )


def _open(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file that is not empty; a pipe or a device would block for ever."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise ReadError("the path is a folder, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise ReadError("the path is no regular file")
    if status.st_size == 0:
        raise ReadError("the file is empty")
    return open(path, "rb")


def _unknown(head: bytes) -> str:
    kind = next((name for magic, name in _OTHER_KINDS if head.startswith(magic)), "")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        kind = "WebP"
    return f"the file is not a {_SUPPORTED} image" + (f" but {kind}" if kind else "")


def _read_with_pillow(file: BinaryIO, kind: str, max_pixels: int) -> DecodedImage:
    try:
        with Image.open(file, formats=_FORMATS) as image:
            check_size(image.height, image.width, max_pixels)
            # A phone's MPO is a JPEG with alternates behind it; the first picture is the film.
            pages = getattr(image, "n_frames", 1) if kind != "JPEG" else 1
            if pages != 1:
                raise ReadError(f"the {kind} file holds {pages} images; export the one that is meant")
            depth = _stored_bits(image, kind)
            # "RGB;16B" and the like; a bitmap's "BGR;16" is 16 bits a pixel.
            wide = kind != "BMP" and any(";16" in str(tile[3]) for tile in image.tile)
            image.load()
            orientation = _orientation(image)
            pixels, declared, bits = _grey(image, kind, depth, wide)
    except (ReadError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ReadError(f"the {kind} header is damaged or of a kind that Pillow cannot read") from error
    except Image.DecompressionBombError as error:
        raise ReadError(
            f"the {kind} header gives more pixels than Pillow allows (PIL.Image.MAX_IMAGE_PIXELS)"
        ) from error
    except Exception as error:  # Pillow's decoders raise a dozen classes for damaged data
        raise ReadError(f"the {kind} data cannot be decoded: {one_sentence(error)}") from error
    return DecodedImage(
        pixels=np.ascontiguousarray(_upright(pixels, orientation)),
        declared=declared,
        for_display=bits <= 8,
        bits=bits,
        format=kind,
    )


def _stored_bits(image: Image.Image, kind: str) -> int:
    """Bits of one sample as the header has it; 0 where Pillow does not tell."""
    if kind == "TIFF":
        return int(image.tag_v2.get(258, (1,))[0])
    return {"1": 1, "I": 16, "I;16": 16, "I;16B": 16}.get(image.mode, 8)


def _grey(image: Image.Image, kind: str, bits: int, wide: bool) -> tuple[np.ndarray, tuple[float, float] | None, int]:
    """Return grey pixels, the declared range and the bits of a sample; `wide`: its samples have 16 bits."""
    if image.mode.startswith("I;16"):
        pixels = np.asarray(image).astype(np.uint16)
        # Pillow inverts WhiteIsZero for 8 bits, not for 16.
        if kind == "TIFF" and image.tag_v2.get(262) == 0:
            pixels = (2**bits - 1) - pixels
        return pixels, (0.0, 2.0**bits - 1), bits
    if image.mode == "I":
        return _grey_from_int32(image, kind, bits)
    if image.mode == "F":
        return _finite(np.asarray(image)), None, 32
    if wide:
        raise ReadError(f"the {kind} file has 16 bits a channel in colour or with transparency; save it as 16-bit grey")
    if image.mode in ("LAB", "HSV"):
        raise ReadError(f"the {kind} file is {image.mode} colour; save it as grey")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = _on_black(image)
    if image.mode != "L":
        image = image if image.mode in ("1", "RGB") else image.convert("RGB")
        image = image.convert("L")
    return np.asarray(image), (0.0, 255.0), min(bits, 8)


def _grey_from_int32(image: Image.Image, kind: str, bits: int) -> tuple[np.ndarray, tuple[float, float] | None, int]:
    """Unpack Pillow's mode I, which holds 16-bit PNG (before Pillow 11), signed 16-bit and 32-bit TIFF."""
    pixels = np.asarray(image)
    if kind != "TIFF":
        return pixels.astype(np.uint16), (0.0, 65535.0), 16
    signed = image.tag_v2.get(339, (1,))[0] == 2
    if bits == 16:
        declared = (-32768.0, 32767.0) if signed else (0.0, 65535.0)
        return pixels.astype(np.float32), declared, 16
    if not signed:
        pixels = pixels.view(np.uint32)
    return pixels.astype(np.float32), None, 32


def _on_black(image: Image.Image) -> Image.Image:
    """Lay an image with transparency on black, the surround of a radiograph."""
    image = image.convert("RGBA")
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, image).convert("RGB")


def _finite(pixels: np.ndarray) -> np.ndarray:
    if not np.isfinite(pixels).all():
        raise ReadError("the image has NaN or infinite values")
    return pixels


def _orientation(image: Image.Image) -> int:
    """Read EXIF orientation after loading (Pillow has turned TIFF by then); 1 where the block is damaged."""
    try:
        return int(image.getexif().get(274, 1))
    except Exception:  # a damaged EXIF block raises anything, and says nothing about the pixels
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    transpose, rows, columns = _ORIENTATIONS.get(orientation, (False, False, False))
    if transpose:
        pixels = pixels.T
    return pixels[:: -1 if rows else 1, :: -1 if columns else 1]


class _ThreadMark(logging.Filter):
    """Says whether this thread is reading a file: as a warnings filter's module, and as a filter of log records."""

    def __init__(self) -> None:
        super().__init__()
        self._state = threading.local()
        self._lock = threading.Lock()
        self._entry = ("ignore", None, Warning, self, 0)

    def match(self, _: str) -> bool:
        return getattr(self._state, "reading", False)

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002
        return not self.match("")

    def install(self) -> None:
        """Be the first warnings filter; `catch_warnings` elsewhere drops entries, so look each time."""
        with self._lock:
            if not warnings.filters or warnings.filters[0] is not self._entry:
                with contextlib.suppress(ValueError):
                    warnings.filters.remove(self._entry)
                warnings.filters.insert(0, self._entry)

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        outer = self.match("")
        self._state.reading = True
        try:
            yield
        finally:
            self._state.reading = outer


_MARK = _ThreadMark()


def silence_loggers(package: str) -> None:
    """Drop what the loggers of a package that is imported say while this module reads a file.

    A logger's filters do not see the records of the loggers below it, so each gets the filter.
    """
    for name in [package, *logging.root.manager.loggerDict]:
        if name == package or name.startswith(package + "."):
            logging.getLogger(name).addFilter(_MARK)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence decoders' warnings, and logs given to `silence_loggers`, in this thread alone.

    `warnings.catch_warnings` swaps a list that all threads share, so it cannot be used by parallel readers.
    """
    _MARK.install()
    with _MARK.here():
        yield

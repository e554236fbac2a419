"""What reading an image file returns, and the limits on size and memory that hold for every format."""

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from simsid.errors import ReadError

# A radiograph of 35 x 43 cm scanned at 50 micrometers has 60 million pixels. Pillow's own limit (179 million) is
# higher, so that the same message comes for every format.
MAX_PIXELS = 100_000_000
MAX_SIDE = 32_768
# Peak memory of decoding and preprocessing one file of at most `MAX_PIXELS`, as tests/data/test_memory.py measures it.
MAX_BYTES = 480_000_000
# Pixels that are converted at a time, so that temporary arrays stay small.
BAND_PIXELS = 2**20


@dataclass(frozen=True)
class DecodedImage:
    """Gray values of one image, upright, before any change of size or depth.

    Args:
        pixels: `[H, W]`, uint8, uint16 or float32, finite and not constant; larger is brighter.
        declared: the values that stand for black and white, from the file's bit depth or its window; `None` where the
            file declares none (32-bit and floating-point samples).
        for_display: whether `declared` is the range meant for viewing: 8 bits, or a DICOM window or VOI LUT.
        bits: bits of a sample that the file stores.
        format: `"PNG"`, `"JPEG"`, `"TIFF"`, `"BMP"` or `"DICOM"`.
        padding: `[H, W]` bool, pixels outside the image (DICOM's Pixel Padding Value, transparent 16-bit PNG); `None`
            for none.
        for_processing: whether DICOM's Presentation Intent Type is FOR PROCESSING: raw detector data, whose gray scale
            is not the one of a diagnostic image.
        provenance: how the gray values came about, such as `{"bits_stored": 12, "voi": "LINEAR"}`: standard terms and
            numbers only, never the text of a patient's tag.
    """

    pixels: np.ndarray
    declared: tuple[float, float] | None
    for_display: bool
    bits: int
    format: str
    padding: np.ndarray | None = field(default=None, repr=False)
    for_processing: bool = False
    provenance: dict[str, str | int | float] = field(default_factory=dict)


def check_size(rows: int, columns: int, max_pixels: int) -> None:
    """Raise ReadError unless an image of this size may be decoded."""
    if rows < 1 or columns < 1:
        raise ReadError(f"the header gives no size: {columns} x {rows} pixels")
    size = f"the header says {columns} x {rows} pixels, more than the"
    if rows * columns > max_pixels:
        raise ReadError(f"{size} {max_pixels / 1e6:g} million allowed")
    if max(rows, columns) > MAX_SIDE:
        raise ReadError(f"{size} {MAX_SIDE} allowed on a side")


def allowed_bytes(max_pixels: int) -> int:
    """Return the memory that decoding one file may take: `MAX_BYTES`, in proportion for a larger `max_pixels`."""
    return int(MAX_BYTES * max(1.0, max_pixels / MAX_PIXELS))


def check_memory(rows: int, columns: int, bytes_per_pixel: float, max_pixels: int, beside: int = 0) -> int:
    """Return the bytes that decoding needs; raise ReadError above `allowed_bytes`.

    Args:
        bytes_per_pixel: bytes a pixel that are held at the same time, in the decoder and in the result.
        beside: bytes that do not depend on the number of pixels.
    """
    needed = int(rows * columns * bytes_per_pixel) + beside
    allowed = allowed_bytes(max_pixels)
    if needed > allowed:
        raise ReadError(
            f"decoding {columns} x {rows} pixels of this kind needs {needed / 1e6:.0f} MB, "
            f"more than the {allowed / 1e6:.0f} MB allowed"
        )
    return needed


class MemoryBudget:
    """Bytes that all threads together may hold while they decode; `reserve` waits for its turn, in order of arrival."""

    def __init__(self, total: int) -> None:
        self._total = total
        self.reset()

    def reset(self) -> None:
        """Forget every reservation: a forked process inherits those of threads that it does not have."""
        self._free = self._total
        self._released = threading.Condition()
        self._turn = threading.Lock()

    @contextlib.contextmanager
    def reserve(self, amount: int) -> Iterator[None]:
        """Hold `amount` bytes; what exceeds the budget is decoded alone."""
        amount = min(amount, self._total)
        # The turn keeps a large file from waiting for ever behind small ones that arrive later.
        with self._turn, self._released:
            self._released.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._released:
                self._free += amount
                self._released.notify_all()


# Room for two dozen threads that decode images of 9 million pixels, or for four of the largest images.
BUDGET = MemoryBudget(4 * MAX_BYTES)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=BUDGET.reset)


def file_length(file: BinaryIO) -> int:
    """Return the bytes of a file, which stays where it is."""
    position = file.tell()
    length = file.seek(0, os.SEEK_END)
    file.seek(position)
    return length


def bands(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of rows of about `BAND_PIXELS` pixels each."""
    step = max(1, BAND_PIXELS // columns)
    for top in range(0, rows, step):
        yield slice(top, min(top + step, rows))


def validated(image: DecodedImage) -> DecodedImage:
    """Return the image unless its values cannot be scored.

    The check comes after the last cast, since a float64 value or range can overflow float32, or vanish in it.

    Raises:
        ReadError: NaN or infinite pixels, no contrast, or a range that float32 cannot hold.
    """
    if not np.isfinite([image.pixels.min(), image.pixels.max()]).all():
        raise ReadError("the image has NaN or infinite values, or values beyond float32")
    low, high = extremes(image)
    if low == high:
        shown = " after its VOI LUT or window" if image.provenance.get("voi", "none") != "none" else ""
        raise ReadError(f"the image has no contrast: every pixel is {low:g}{shown}")
    for bottom, top in ((low, high), image.declared or (low, high)):
        with np.errstate(all="ignore"):
            spread = np.float32(top) - np.float32(bottom)
        if not np.isfinite(spread) or spread <= 0:
            raise ReadError(f"the range of the gray values, {bottom:g} to {top:g}, does not fit float32")
    return image


def extremes(image: DecodedImage) -> tuple[float, float]:
    """Return the least and greatest gray value outside the padding."""
    if image.padding is None:
        return float(image.pixels.min()), float(image.pixels.max())
    low, high = np.inf, -np.inf
    for band in bands(*image.pixels.shape):
        inside = image.pixels[band][~image.padding[band]]
        if inside.size:
            low, high = min(low, float(inside.min())), max(high, float(inside.max()))
    return low, high


def pixels_inside(image: DecodedImage) -> np.ndarray:
    """Return a copy of the gray values outside the padding, in one dimension."""
    if image.padding is None:
        return image.pixels.flatten()
    inside = np.empty(image.padding.size - np.count_nonzero(image.padding), image.pixels.dtype)
    end = 0
    for band in bands(*image.pixels.shape):
        values = image.pixels[band][~image.padding[band]]
        inside[end : end + values.size] = values
        end += values.size
    return inside


def one_sentence(error: BaseException) -> str:
    """Return an exception's message as one line of at most 200 characters, its class where it has none.

    Memory addresses are left out: the same file must give the same message in every run.
    """
    text = re.sub(r"( object)? at 0x[0-9A-Fa-f]+", "", " ".join(str(error).split()).rstrip(".")) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"

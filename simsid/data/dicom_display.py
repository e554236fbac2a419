"""Turns stored DICOM values into gray values: modality LUT, then VOI LUT or window, then MONOCHROME1 inversion.

For samples of up to 16 bits these steps are one table over all possible samples, computed in float64; the image then
takes one look-up a pixel.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels import apply_windowing

from simsid.data.decoded import DecodedImage, bands
from simsid.data.dicom_elements import element_name, integer, number, sequence_item, text, unreadable
from simsid.errors import ReadError

_ABSENT = 2**63
Limits = tuple[float, float] | None
Function = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class _Step:
    """A function of single values, the range of its results, and what it is in the standard's terms."""

    function: Function
    limits: Limits
    provenance: dict[str, str | int | float]


@dataclass(frozen=True)
class Samples:
    """How a stored word holds a sample.

    Args:
        allocated: bits of a word.
        bits: Bits Stored.
        shift: unused bits below the sample; those above it are ignored, since old files keep overlays there.
        signed: whether the sample is two's complement.
        is_float: whether words are floating-point samples.
    """

    allocated: int
    bits: int
    shift: int
    signed: bool
    is_float: bool

    @property
    def limits(self) -> Limits:
        """The range of the samples; `None` above 16 bits and for floats, which declare none."""
        if self.is_float or self.bits > 16:
            return None
        if self.signed:
            return -(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1) - 1
        return 0.0, 2.0**self.bits - 1

    def values(self, words: np.ndarray) -> np.ndarray:
        """Return int64 samples of words, floats as they are."""
        if self.is_float:
            return words
        values = (words.astype(np.int64) >> self.shift) & (2**self.bits - 1)
        if self.signed:
            values -= (values >> (self.bits - 1)) << self.bits
        return values

    def from_header(self, number: int) -> int | None:
        """Return a number of the header as a sample, `None` where it is not one.

        Writers encode it with the other sign, at the width of the word or of the sample: 63536 for -2000, -1 for 65535.
        """
        least = -(2 ** (self.bits - 1)) if self.signed else 0
        size = 2**self.bits
        bottom = -(2 ** (self.allocated - 1)) if self.signed else 0
        wrapped = (number - bottom) % 2**self.allocated + bottom
        if least <= wrapped < least + size:
            return wrapped
        return (number - least) % size + least if 0 <= number < size else None


def samples(dataset: Dataset, *, justified: bool) -> Samples:
    """Read from the header how the samples lie in their words.

    Args:
        justified: whether the decoder moves the samples to the low bits.

    Raises:
        ReadError: Bits Stored and High Bit that do not fit the word.
    """
    allocated = integer(dataset, "BitsAllocated", 16)
    width = next((size for size in (8, 16, 32) if allocated <= size), 64)
    if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        return Samples(width, width, 0, True, True)
    bits = integer(dataset, "BitsStored", allocated)
    if not 1 <= bits <= min(allocated, 32):
        raise ReadError(f"the DICOM element Bits Stored (0028,0101) is {bits}, Bits Allocated (0028,0100) {allocated}")
    high = integer(dataset, "HighBit", bits - 1)
    if not bits - 1 <= high < allocated:
        raise ReadError(f"the DICOM element High Bit (0028,0102) is {high} with {bits} of {allocated} bits stored")
    if justified and high != bits - 1:
        raise ReadError(
            f"the DICOM element High Bit (0028,0102) is {high} in compressed data of {bits} bits, not {bits - 1}"
        )
    return Samples(width, bits, high + 1 - bits, integer(dataset, "PixelRepresentation", 0) == 1, False)


def display(dataset: Dataset, words: np.ndarray, layout: Samples) -> DecodedImage:
    """Return the image of stored words `[H, W]` as a viewer shows it by default.

    Source: DICOM PS3.3 C.11.1, C.11.2, C.7.6.3.1.2, C.7.5.1.1.2 and C.7.6.16.2.
    """
    polarity = text(dataset, "PhotometricInterpretation")
    modality = _modality(dataset, layout)
    voi = _voi(dataset, modality.limits)
    limits = (voi or modality).limits

    def transfer(chunk: np.ndarray) -> np.ndarray:
        values = modality.function(layout.values(chunk))
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ReadError("the DICOM image has NaN or infinite values, or its rescale overflows")
        values = voi.function(values) if voi else values
        return limits[0] + limits[1] - values if limits and polarity == "MONOCHROME1" else values

    if words.dtype.kind != "f":
        words = words.view(np.dtype(f"{words.dtype.byteorder}u{words.dtype.itemsize}"))
    with np.errstate(all="ignore"):  # what overflows is refused by `validated`
        padding = _mapped(words, np.bool_, is_padding) if (is_padding := _padding(dataset, layout)) else None
        pixels = _mapped(words, np.float32, transfer)
        if limits is None and polarity == "MONOCHROME1":
            np.subtract(pixels.min() + pixels.max(), pixels, out=pixels)
    intent = text(dataset, "PresentationIntentType")
    return DecodedImage(
        pixels=pixels,
        declared=limits,
        for_display=voi is not None or layout.bits <= 8,
        bits=layout.bits,
        format="DICOM",
        padding=padding if padding is not None and padding.any() and not padding.all() else None,
        for_processing=intent == "FOR PROCESSING",
        provenance={
            "bits_stored": layout.bits,
            "photometric_interpretation": polarity,
            "presentation_intent": intent if intent in ("FOR PROCESSING", "FOR PRESENTATION") else "",
            **modality.provenance,
            **(voi.provenance if voi else {"voi": "none"}),
        },
    )


def _mapped(words: np.ndarray, dtype: type, function: Function) -> np.ndarray:
    """Apply a function of single words, through a table where words have at most 16 bits."""
    result: np.ndarray = np.empty(words.shape, dtype)
    table: np.ndarray | None = None
    if words.dtype.kind != "f" and words.dtype.itemsize <= 2:
        table = function(np.arange(2 ** (8 * words.dtype.itemsize), dtype=words.dtype)).astype(dtype)
    for band in bands(*words.shape):
        if table is None:
            result[band] = function(words[band])
        else:  # every word is an index; "clip" spares a check of each
            np.take(table, words[band], out=result[band], mode="clip")
    return result


def _padding(dataset: Dataset, layout: Samples) -> Function | None:
    """Return which words Pixel Padding Value, or the range up to its limit, declares to be outside the image."""
    value = None if layout.is_float else integer(dataset, "PixelPaddingValue", _ABSENT)
    if value is None or value == _ABSENT:
        return None
    limit = integer(dataset, "PixelPaddingRangeLimit", value)
    ends = [layout.from_header(number) for number in (value, limit)]
    samples = sorted(end for end in ends if end is not None)
    # Wider than a sample: the value fills the word.
    words = sorted(number % 2**layout.allocated for number in (value, limit))

    def is_padding(chunk: np.ndarray) -> np.ndarray:
        values, (low, high) = (layout.values(chunk), samples) if len(samples) == 2 else (chunk, words)
        return (values >= low) & (values <= high)

    return is_padding


def _groups(dataset: Dataset, macro: str) -> Iterator[Dataset]:
    """Yield what can hold a value of an image, in order of precedence: its own group, the shared group, the root."""
    for keyword in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        group = sequence_item(dataset, keyword)
        item = sequence_item(group, macro) if group is not None else None
        if item is not None:
            yield item
    yield dataset


def _modality(dataset: Dataset, layout: Samples) -> _Step:
    """Return the modality LUT or the rescale."""
    limits = layout.limits
    for group in _groups(dataset, "PixelValueTransformationSequence"):
        table = sequence_item(group, "ModalityLUTSequence")
        if table is not None:
            function, top = _look_up(dataset, table, layout.signed)
            return _Step(function, (0.0, top), {"modality": "Modality LUT"})
        slope, intercept = number(group, "RescaleSlope"), number(group, "RescaleIntercept")
        if slope is None or intercept is None:
            continue
        return _rescale(slope, intercept, limits)
    return _Step(lambda values: values, limits, {"modality": "none"})


def _rescale(slope: float, intercept: float, limits: Limits) -> _Step:
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise ReadError(f"the DICOM Rescale Slope (0028,1053) is {slope:g}, the Rescale Intercept {intercept:g}")
    if limits is not None:
        low, high = sorted(limit * slope + intercept for limit in limits)
        limits = (low, high)
    return _Step(
        lambda values: values.astype(np.float64) * slope + intercept,
        limits,
        {"modality": "rescale", "rescale_slope": slope, "rescale_intercept": intercept},
    )


def _voi(dataset: Dataset, limits: Limits) -> _Step | None:
    """Return the first VOI LUT, else the first usable window; `None` for neither."""
    for group in _groups(dataset, "FrameVOILUTSequence"):
        table = sequence_item(group, "VOILUTSequence")
        if table is not None and "LUTDescriptor" in table and "LUTData" in table:
            function, top = _look_up(dataset, table, limits is not None and limits[0] < 0)
            return _Step(function, (0.0, top), {"voi": "VOI LUT"})
        if (window := _window(group)) is not None:
            return window
    return None


def _window(group: Dataset) -> _Step | None:
    """Return the first window, mapped to 0..1; `None` for an absent, empty, unreadable or unusable one."""
    try:
        center, width = number(group, "WindowCenter"), number(group, "WindowWidth")
    except ReadError:
        return None
    if center is None or width is None or not np.isfinite([center, width]).all():
        return None
    shape = text(group, "VOILUTFunction") or "LINEAR"
    if shape not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise ReadError("the DICOM VOI LUT Function (0028,1056) is not one of LINEAR, LINEAR_EXACT and SIGMOID")
    if width < 1 if shape == "LINEAR" else width <= 0:
        return None
    # With one unsigned bit pydicom's window maps to 0..1.
    window = Dataset()
    window.PhotometricInterpretation, window.BitsStored, window.PixelRepresentation = "MONOCHROME2", 1, 0
    window.VOILUTFunction = shape
    # Set as numbers of type FD: a decimal string has at most 16 characters.
    window.add_new("WindowCenter", "FD", center)
    window.add_new("WindowWidth", "FD", width)
    return _Step(
        lambda values: apply_windowing(values, window),
        (0.0, 1.0),
        {"voi": shape, "window_center": center, "window_width": width},
    )


def _look_up(dataset: Dataset, item: Dataset, signed: bool) -> tuple[Function, float]:
    """Return a LUT as a function, and the top of its range; values beyond either end take the end's entry.

    pydicom's own LUTs are not used: it cannot represent depths such as 12 in a modality LUT or 9 in a VOI LUT, wraps
    around where the first value is negative and the samples are unsigned, and trusts the declared depth.
    """
    try:
        entries, first, depth = (int(value) for value in item.LUTDescriptor)
    except Exception:
        raise unreadable("LUTDescriptor", "three whole numbers") from None
    entries = entries or 2**16
    # The first value mapped shares the sign of the values, but not always its encoding.
    if signed and first >= 2**15:
        first -= 2**16
    if not signed and first < 0:
        first += 2**16
    table = _table(dataset, item, entries)
    # Computed radiographs declare 16 bits for tables whose largest entry is 4095. An entry above the declared depth
    # shows that the depth is wrong, too.
    needed = max(8, int(table.max()).bit_length())
    top = 2.0 ** (min(needed, depth) if int(table.max()).bit_length() <= depth and depth >= 8 else needed) - 1

    def function(values: np.ndarray) -> np.ndarray:
        index = np.clip(np.rint(values), first, first + len(table) - 1).astype(np.int64) - first
        return table[index]

    return function, top


def _table(dataset: Dataset, item: Dataset, entries: int) -> np.ndarray:
    try:
        data = item.LUTData
    except Exception:
        raise unreadable("LUTData") from None
    if isinstance(data, bytes):
        _, little = dataset.original_encoding
        # 8-bit entries come packed as bytes, or one to a word.
        if len(data) < 2 * entries:
            table = np.frombuffer(data, np.uint8)
        else:
            table = np.frombuffer(data[: 2 * entries], "<u2" if little else ">u2")
    else:
        table = np.atleast_1d(np.asarray(data)).astype(np.int64)
    if len(table) < entries:
        raise ReadError(
            f"a DICOM look-up table has {len(table)} of the {entries} entries that its {element_name('LUTDescriptor')} "
            "says"
        )
    return table[:entries].astype(np.int64)

"""Reads one DICOM file: only the elements that the image needs, within limits that the header is checked against."""

import zlib
from typing import BinaryIO, cast

from pydicom.dataset import Dataset
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag, Tag

from simsid.data.decoded import BUDGET, DecodedImage, allowed_bytes, check_memory, check_size, file_length, validated
from simsid.data.dicom_display import display, samples
from simsid.data.dicom_elements import element_name, integer, text, uid_name
from simsid.data.dicom_pixels import is_compressed, is_justified, peak_bytes, stored_words, transfer_syntax
from simsid.data.quiet import silence_loggers
from simsid.errors import ReadError

# What a message may quote; a damaged element can hold anything, a patient's name included.
_COLOR = ("PALETTE COLOR", "RGB", "HSV", "ARGB", "CMYK", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_RCT")
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_HEADER = (
    "SOPClassUID",
    "PresentationIntentType",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
)
_DISPLAY = (
    "RescaleSlope",
    "RescaleIntercept",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "ModalityLUTSequence",
    "VOILUTSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
_STOPS = frozenset(Tag(keyword) for keyword in (*_PIXELS, "PerFrameFunctionalGroupsSequence"))
_UNDEFINED = 0xFFFFFFFF
# Bytes of one element: of a number or short text, and of a sequence, whose items cost 50 times their bytes as objects.
_LONGEST = {Tag(keyword): 2**16 for keyword in _HEADER} | {Tag(keyword): 2**22 for keyword in _DISPLAY}
# Every element, and every fragment of compressed data, takes a read at least and becomes an object. Sequences of
# undefined length are parsed in full, needed or not.
_MOST_READS = 100_000
# Bytes that are read of everything beside the pixels.
_LONGEST_HEADER = 64 * 2**20

# pydicom's log quotes header values, a patient's among them.
for _package in ("pydicom", "pylibjpeg", "openjpeg", "_openjpeg", "jpeg_ls"):
    silence_loggers(_package)


def read_dicom(file: BinaryIO, max_pixels: int) -> DecodedImage:
    """Read a grayscale, single-frame DICOM image.

    `pixels` is what a viewer shows by default: stored values through the modality LUT (or rescale), then through the
    first VOI LUT, else the first window (LINEAR, LINEAR_EXACT, SIGMOID), then inverted for MONOCHROME1. Values of an
    enhanced object's functional groups precede those of the root. With a VOI LUT or a window, `declared` is the range
    that maps to and `for_display` holds. Without (an empty, unreadable or zero-width window counts as none), `declared`
    is the range of the stored bits after the rescale, for display at 8 bits only.

    Elements that name the patient are not read.

    Source: DICOM PS3.3 C.11.1, C.11.2, C.7.6.3.1.2, C.7.5.1.1.2 and C.7.6.16.2.

    Raises:
        ReadError: the text quotes no header value that could name a patient.
    """
    try:
        header = _parse(file, max_pixels, _HEADER, with_pixels=False)
        rows, columns = _checked_size(header, max_pixels)
        needed = check_memory(rows, columns, peak_bytes(header), max_pixels, _bytes_beside(file, header))
        with BUDGET.reserve(needed):
            dataset = _parse(file, max_pixels, _HEADER + _DISPLAY + _PIXELS, with_pixels=True)
            layout = samples(dataset, justified=is_justified(transfer_syntax(dataset)))
            words = stored_words(dataset)
            for keyword in _PIXELS:
                dataset.pop(keyword, None)
            return validated(display(dataset, words, layout))
    except (ReadError, MemoryError):
        raise
    except Exception as error:  # pydicom raises a dozen classes where it parses or converts
        # Not chained: their messages quote the values, a patient's name among them.
        raise ReadError(f"the DICOM header is damaged ({type(error).__name__})") from None


class _CheckedFile:
    """A file that refuses a deflated data set which is too large, and a header that is too long.

    pydicom reads to the end of a file in one case only: there follows a deflated data set, which it then inflates at
    once. Checking it here sees what pydicom sees, whatever the layout of preamble and meta information.
    """

    def __init__(self, file: BinaryIO, most_bytes: int, most_inflated: int) -> None:
        self._file = file
        self._bytes = most_bytes
        self._reads = _MOST_READS
        self._inflated = most_inflated
        self.seek, self.tell = file.seek, file.tell
        self.name = ""
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        self._reads -= 1
        if self._reads < 0:
            raise ReadError("the DICOM file has too many elements")
        if size < 0:
            # What is larger before it is inflated than after cannot be valid.
            data = self._file.read(self._inflated + 1)
            check_inflated_size(data, self._inflated)
            return data
        data = self._file.read(min(size, self._bytes + 1))
        self._bytes -= len(data)
        if self._bytes < 0:
            raise ReadError("the DICOM header is too long")
        return data


def check_inflated_size(data: bytes, limit: int) -> None:
    """Raise ReadError unless raw deflate data is complete and inflates to at most `limit` bytes."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    size = position = 0
    try:
        # Until the end of the stream: what follows it stays in `unconsumed_tail` for ever.
        while not inflater.eof:
            chunk = inflater.unconsumed_tail
            if not chunk:
                chunk = data[position : position + 2**16]
                position += len(chunk)
            inflated = len(inflater.decompress(chunk, 2**20))
            if not chunk and not inflated:
                raise ReadError("the deflated DICOM data set is cut off")
            size += inflated
            if size > limit:
                raise ReadError(f"the deflated DICOM data set is larger than the {limit / 1e6:.0f} MB allowed")
    except zlib.error:
        raise ReadError("the deflated DICOM data set is damaged") from None


def _parse(file: BinaryIO, max_pixels: int, keywords: tuple[str, ...], *, with_pixels: bool) -> Dataset:
    """Read the elements of `keywords`; the others are passed over."""
    file.seek(0)
    # Of the memory allowed, the inflated data set takes a part: pydicom copies it, and the result comes on top.
    limit = min(8 * max_pixels + _LONGEST_HEADER, allowed_bytes(max_pixels) // 4)
    # Before the pixels are read, the length of the file has been counted; pydicom reads some of it twice.
    most_bytes = 2 * file_length(file) + _LONGEST_HEADER if with_pixels else _LONGEST_HEADER
    latest: list[BaseTag] = []

    def stop(tag: BaseTag, _: str | None, length: int) -> bool:
        latest[:] = [tag]
        if not with_pixels and tag in _STOPS:
            return True
        if length != _UNDEFINED and length > _LONGEST.get(tag, length):
            raise ReadError(f"the DICOM element {element_name(tag)} has {length} bytes")
        return False

    try:
        return read_partial(
            cast(BinaryIO, _CheckedFile(file, most_bytes, limit)),
            stop_when=stop,
            force=True,
            specific_tags=[Tag(keyword) for keyword in keywords],
        )
    except (ReadError, MemoryError):
        raise
    except Exception as error:
        where = f" at the element {element_name(latest[0])}" if latest else ""
        raise ReadError(f"the DICOM header is damaged{where} ({type(error).__name__})") from None


def _bytes_beside(file: BinaryIO, header: Dataset) -> int:
    """Return the bytes of the file that are read beside the samples: twice what is compressed, else the rest."""
    length = file_length(file)
    if is_compressed(transfer_syntax(header)):
        return 2 * length
    samples = integer(header, "Rows", 0) * integer(header, "Columns", 0) * integer(header, "BitsAllocated", 16) // 8
    return max(0, length - samples)


def _checked_size(header: Dataset, max_pixels: int) -> tuple[int, int]:
    """Return rows and columns of a header that says one grayscale frame of an acceptable size."""
    if "Rows" not in header or "Columns" not in header:
        kind = _sop_class(header)
        raise ReadError(f"the DICOM file holds no image{kind}: Rows (0028,0010) or Columns (0028,0011) is missing")
    samples = integer(header, "SamplesPerPixel", 1)
    if samples != 1:
        raise ReadError(f"the DICOM image is in color: Samples per Pixel (0028,0002) is {samples}")
    photometric = text(header, "PhotometricInterpretation")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise ReadError(
            "the DICOM image is not grayscale: Photometric Interpretation (0028,0004) is "
            + (photometric if photometric in _COLOR else "unknown" if photometric else "missing")
        )
    frames = integer(header, "NumberOfFrames", 1)
    if frames > 1:
        raise ReadError(f"the DICOM image is multi-frame: Number of Frames (0028,0008) is {frames}")
    rows, columns = integer(header, "Rows", 0), integer(header, "Columns", 0)
    check_size(rows, columns, max_pixels)
    return rows, columns


def _sop_class(header: Dataset) -> str:
    uid = header.get("SOPClassUID") or getattr(header, "file_meta", Dataset()).get("MediaStorageSOPClassUID")
    name = uid_name(uid) if uid else ""
    return f" ({name})" if name else ""

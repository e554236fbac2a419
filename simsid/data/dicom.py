"""Reads one DICOM file: modality LUT, then VOI LUT or window, then MONOCHROME1 inversion."""

import struct
import zlib
from typing import BinaryIO

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder, pixel_array
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from simsid.data.reading import DecodedImage, check_size, one_sentence, silence_loggers
from simsid.errors import ReadError

# What a message may quote; a damaged element can hold anything, a patient's name too.
_COLOUR = ("PALETTE COLOR", "RGB", "HSV", "ARGB", "CMYK", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_RCT")
# Beside the pixels (at most 8 bytes each): headers, overlays, an icon.
_DEFLATED_HEADER = 64 * 2**20

# pydicom's log quotes header values, a patient's among them.
for _package in ("pydicom", "pylibjpeg", "openjpeg", "_openjpeg", "jpeg_ls"):
    silence_loggers(_package)


def read_dicom(file: BinaryIO, max_pixels: int) -> DecodedImage:
    """Read a greyscale, single-frame DICOM image.

    ``pixels`` is what a viewer shows by default: stored values through the modality LUT (or rescale), then through the
    first VOI LUT, else the first window (LINEAR, LINEAR_EXACT, SIGMOID), then inverted for MONOCHROME1. With a VOI LUT
    or a window, ``declared`` is the range that maps to and ``for_display`` holds. Without (an empty or zero-width
    window counts as none), ``declared`` is the range of the stored bits after the rescale, for display at 8 bits only.

    Source: DICOM PS3.3 C.11.1, C.11.2, C.7.6.3.1.2 and C.7.5.1.1.2.

    Raises: ReadError; its text quotes no header value that could name a patient.
    """
    _check_inflated_size(file, 8 * max_pixels + _DEFLATED_HEADER)
    try:
        file.seek(0)
        _check_header(pydicom.dcmread(file, force=True, stop_before_pixels=True), max_pixels)
        file.seek(0)
        dataset = pydicom.dcmread(file, force=True)
        return _display(dataset, _stored_values(dataset))
    except (ReadError, MemoryError):
        raise
    except Exception as error:  # pydicom raises a dozen classes where it parses or converts
        # Not chained: their messages quote the values, a patient's name among them.
        raise ReadError(f"the DICOM header is damaged ({type(error).__name__})") from None


def _check_inflated_size(file: BinaryIO, limit: int) -> None:
    """Raise ReadError where a deflated data set is larger than an image can be; pydicom would inflate it whole."""
    head = file.read(1024)
    if DeflatedExplicitVRLittleEndian.encode() not in head or head[132:140] != b"\2\0\0\0UL\4\0":
        return
    file.seek(144 + int.from_bytes(head[140:144], "little"))
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    size = 0
    try:
        while chunk := inflater.unconsumed_tail or file.read(2**16):
            size += len(inflater.decompress(chunk, 2**20))
            if size > limit:
                raise ReadError(f"the deflated DICOM data set is larger than the {limit / 1e6:.0f} MB allowed")
    except zlib.error:
        raise ReadError("the deflated DICOM data set is damaged") from None


def _check_header(header: Dataset, max_pixels: int) -> None:
    if "Rows" not in header or "Columns" not in header:
        kind = _sop_class(header)
        raise ReadError(f"the DICOM file holds no image{kind}: Rows (0028,0010) or Columns (0028,0011) is missing")
    samples = _integer(header, "SamplesPerPixel", 1)
    if samples != 1:
        raise ReadError(f"the DICOM image is in colour: Samples per Pixel (0028,0002) is {samples}")
    photometric = str(header.get("PhotometricInterpretation", "")).strip().upper()
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise ReadError(
            "the DICOM image is not greyscale: Photometric Interpretation (0028,0004) is "
            + (photometric if photometric in _COLOUR else "unknown" if photometric else "missing")
        )
    frames = _integer(header, "NumberOfFrames", 1)
    if frames > 1:
        raise ReadError(f"the DICOM image is multi-frame: Number of Frames (0028,0008) is {frames}")
    check_size(_integer(header, "Rows", 0), _integer(header, "Columns", 0), max_pixels)


def _integer(dataset: Dataset, keyword: str, default: int) -> int:
    try:
        value = dataset.get(keyword)
        return default if value is None or value == "" else int(value)
    except Exception:
        raise ReadError(f"the DICOM element {keyword} {Tag(keyword)} is no whole number") from None


def _sop_class(header: Dataset) -> str:
    uid = header.get("SOPClassUID") or getattr(header, "file_meta", Dataset()).get("MediaStorageSOPClassUID")
    name = _uid_name(uid) if uid else ""
    return f" ({name})" if name else ""


def _uid_name(uid: object) -> str:
    """Return the standard's name of a UID, ``""`` for any other text: a damaged one may have run into the patient's."""
    text = str(uid)
    name = UID(text).name
    return name if name != text else ""


def _stored_values(dataset: Dataset) -> np.ndarray:
    """Decode the pixel data: ``[H, W]``, integers, or floats for float pixel data."""
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ReadError("the DICOM file holds no Pixel Data (7FE0,0010)")
    syntax = _transfer_syntax(dataset)
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise ReadError(f"the DICOM transfer syntax is not supported: {_uid_name(syntax) or 'unknown'}") from None
    if not decoder.is_available:
        raise ReadError(_missing_decoder(syntax))
    if syntax.is_encapsulated:
        _check_codestream(dataset, syntax)
    try:
        values = pixel_array(dataset, raw=True)
    except MemoryError:
        raise
    except Exception as error:  # decoders of six packages, each with its own classes
        raise ReadError(f"the DICOM pixel data ({syntax.name}) cannot be decoded: {_decoders_say(error)}") from None
    if values.ndim != 2:
        raise ReadError(f"the DICOM pixel data has shape {list(values.shape)}, not rows and columns")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ReadError("the image has NaN or infinite values")
    return values


def _decoders_say(error: Exception) -> str:
    """Join what each decoder said; pydicom puts one on a line below a general sentence."""
    lines = [line.strip() for line in str(error).splitlines()]
    return one_sentence(ValueError("; ".join(lines[1:]))) if len(lines) > 1 else one_sentence(error)


def _check_codestream(dataset: Dataset, syntax: UID) -> None:
    """Raise ReadError where compressed data says another size than the header; decoders would believe the data."""
    try:
        size = _codestream_size(get_frame(dataset.PixelData, 0, number_of_frames=1))
    except Exception:  # not encapsulated, or cut off
        raise ReadError(f"the DICOM pixel data ({syntax.name}) is damaged") from None
    if size is not None and size != (dataset.Rows, dataset.Columns):
        raise ReadError(
            f"the compressed DICOM pixel data says {size[1]} x {size[0]} pixels, the header "
            f"{dataset.Columns} x {dataset.Rows}"
        )


def _codestream_size(data: bytes) -> tuple[int, int] | None:
    """Return (rows, columns) of JPEG, JPEG-LS or JPEG 2000 data, ``None`` where it does not start as these do."""
    # JPEG 2000: SOC, then SIZ with the far corner and the offset of the image.
    start = data.find(b"\xff\x4f\xff\x51")
    if start == 0 or data[4:8] == b"jP  ":
        right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
        return bottom - top, right - left
    if data[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 9 <= len(data):
        marker = data[place + 1]
        # Start of frame: C0 to CF without the tables' C4, C8 and CC; F7 in JPEG-LS.
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return struct.unpack_from(">2H", data, place + 5)
        # A fill byte stands alone, a segment has its length.
        place += 1 if marker == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _transfer_syntax(dataset: Dataset) -> UID:
    """Return the transfer syntax; files without meta information have the one they were parsed with."""
    meta = getattr(dataset, "file_meta", None)
    if meta is not None and meta.get("TransferSyntaxUID"):
        return UID(meta.TransferSyntaxUID)
    implicit, little = dataset.original_encoding
    if implicit:
        syntax = ImplicitVRLittleEndian
    else:
        syntax = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    if meta is None:
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    return syntax


def _missing_decoder(syntax: UID) -> str:
    return f"no decoder for {syntax.name} is installed: pip install 'simsid[dicom]'"


def _display(dataset: Dataset, stored: np.ndarray) -> DecodedImage:
    bits = 32 if stored.dtype.kind == "f" else _integer(dataset, "BitsStored", dataset.get("BitsAllocated", 16))
    padding = _padding(dataset, stored)
    values, limits = _modality(dataset, stored, bits)
    viewed = _voi(dataset, values, limits)
    if viewed is not None:
        values, limits = viewed
    if dataset.PhotometricInterpretation.strip().upper() == "MONOCHROME1":
        low, high = limits if limits is not None else (float(values.min()), float(values.max()))
        values = (low + high) - values
    return DecodedImage(
        pixels=np.ascontiguousarray(values, dtype=np.float32),
        declared=limits,
        for_display=viewed is not None or bits <= 8,
        bits=bits,
        format="DICOM",
        padding=padding,
    )


def _padding(dataset: Dataset, stored: np.ndarray) -> np.ndarray | None:
    """Mark the stored values that Pixel Padding Value, or the range up to its limit, declares to be no image."""
    value = dataset.get("PixelPaddingValue")
    if value is None or stored.dtype.kind == "f":
        return None
    limit = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted((int(value), int(value if limit is None else limit)))
    mask = (stored >= low) & (stored <= high)
    return mask if mask.any() and not mask.all() else None


def _modality(dataset: Dataset, stored: np.ndarray, bits: int) -> tuple[np.ndarray, tuple[float, float] | None]:
    """Apply the modality LUT or the rescale; return the values and the range they can take."""
    if dataset.get("ModalityLUTSequence"):
        values, depth = _look_up(dataset, dataset.ModalityLUTSequence[0], stored, signed=_is_signed(dataset))
        return values, (0.0, 2.0**depth - 1)
    if stored.dtype.kind == "f" or bits > 16:
        limits = None
    elif _is_signed(dataset):
        limits = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
    else:
        limits = (0.0, 2.0**bits - 1)
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if slope is None or intercept is None:
        return stored, limits
    slope, intercept = float(slope), float(intercept)
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise ReadError(f"the DICOM Rescale Slope (0028,1053) is {slope:g}, the Rescale Intercept {intercept:g}")
    if limits is not None:
        low, high = sorted(limit * slope + intercept for limit in limits)
        limits = (low, high)
    return stored.astype(np.float64) * slope + intercept, limits


def _is_signed(dataset: Dataset) -> bool:
    return _integer(dataset, "PixelRepresentation", 0) == 1


def _voi(
    dataset: Dataset, values: np.ndarray, limits: tuple[float, float] | None
) -> tuple[np.ndarray, tuple[float, float]] | None:
    """Apply the first VOI LUT, else the first usable window; return values and range, ``None`` for neither."""
    sequence = dataset.get("VOILUTSequence")
    if sequence and "LUTDescriptor" in sequence[0] and "LUTData" in sequence[0]:
        signed = limits is not None and limits[0] < 0
        viewed, depth = _look_up(dataset, sequence[0], np.rint(values), signed=signed)
        return viewed, (0.0, 2.0**depth - 1)
    center, width = _first(dataset, "WindowCenter"), _first(dataset, "WindowWidth")
    if center is None or width is None:
        return None
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()
    values = values.astype(np.float64)
    if function == "LINEAR" and width >= 1:
        # A width of 1 is a threshold: the ramp between has no width left.
        ramp = (values - (center - 0.5)) / max(width - 1, 1e-9) + 0.5
    elif function == "LINEAR_EXACT" and width > 0:
        ramp = (values - center) / width + 0.5
    elif function == "SIGMOID" and width > 0:
        # Far outside the window exp overflows to infinity, and the value to the right limit 0.
        with np.errstate(over="ignore"):
            ramp = 1 / (1 + np.exp(-4 * (values - center) / width))
    elif function in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        return None
    else:
        raise ReadError("the DICOM VOI LUT Function (0028,1056) is not one of LINEAR, LINEAR_EXACT and SIGMOID")
    return np.clip(ramp, 0, 1), (0.0, 1.0)


def _first(dataset: Dataset, keyword: str) -> float | None:
    """Return the first value of a decimal string, ``None`` for an absent, empty or non-finite one."""
    value = dataset.get(keyword)
    if isinstance(value, pydicom.multival.MultiValue):
        value = value[0] if len(value) else None
    if value is None or value == "":
        return None
    return float(value) if np.isfinite(float(value)) else None


def _look_up(dataset: Dataset, item: Dataset, values: np.ndarray, *, signed: bool) -> tuple[np.ndarray, int]:
    """Map values through a LUT; entries beyond either end repeat the end's. Returns the result and its bits."""
    entries, first, depth = (int(value) for value in item.LUTDescriptor)
    entries = entries or 2**16
    # The first value mapped shares the sign of the values, but not always its encoding.
    if signed and first >= 2**15:
        first -= 2**16
    if not signed and first < 0:
        first += 2**16
    table = _table(dataset, item.LUTData, entries)
    index = np.clip(values.astype(np.int64) - first, 0, len(table) - 1)
    return table[index], depth


def _table(dataset: Dataset, data: object, entries: int) -> np.ndarray:
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
        raise ReadError(f"a DICOM look-up table has {len(table)} of the {entries} entries that its descriptor says")
    return table[:entries].astype(np.int64)

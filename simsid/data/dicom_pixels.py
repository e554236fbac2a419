"""Decodes DICOM pixel data to stored words, each compression with one decoder that is known to survive damage."""

import functools
import importlib.util
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder
from pydicom.pixels.decoders.base import Decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from simsid.data import gdcm_child
from simsid.data.codestream import Codestream, codestream_header
from simsid.data.decoded import one_sentence
from simsid.data.dicom_elements import integer, uid_name
from simsid.errors import ReadError

# Left to itself pydicom falls back to GDCM for every syntax, in this process, which damaged data then aborts.
_PLUGINS: dict[str, str] = {
    RLELossless: "pydicom",
    JPEGBaseline8Bit: "pillow",
    JPEGExtended12Bit: "pillow",
    JPEGLSLossless: "pyjpegls",
    JPEGLSNearLossless: "pyjpegls",
    JPEG2000Lossless: "pylibjpeg",
    JPEG2000: "pylibjpeg",
    HTJ2KLossless: "pylibjpeg",
    HTJ2KLosslessRPCL: "pylibjpeg",
    HTJ2K: "pylibjpeg",
}
_GDCM = {
    JPEGLossless: gdcm_child.LOSSLESS,
    JPEGLosslessSV1: gdcm_child.LOSSLESS_FIRST_ORDER,
    JPEGExtended12Bit: gdcm_child.EXTENDED,
}
GDCM_SECONDS = 60.0

# Bytes that each decoder holds for a pixel and for a byte of its sample (OpenJPEG decodes to 32 bits);
# tests/data/test_memory.py compares them with measured peaks.
_DECODER_BYTES = {"pydicom": (0, 4), "pillow": (0, 4), "pyjpegls": (0, 3), "pylibjpeg": (4, 2), "gdcm": (0, 4)}


def transfer_syntax(dataset: Dataset) -> UID:
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


def peak_bytes(header: Dataset) -> float:
    """Return the bytes a pixel that decoding, display and preprocessing hold at most, from the header alone."""
    syntax = transfer_syntax(header)
    sample = max(1, integer(header, "BitsAllocated", 16) // 8)
    # Float32 and the words they come from; above 8 bits a copy for the percentiles follows when the words are gone.
    displayed = 4.0 + max(4 if sample > 1 else 1, sample) + ("PixelPaddingValue" in header)
    if syntax == DeflatedExplicitVRLittleEndian:
        # The inflated data set stays, and pydicom joins it from blocks.
        return 3 * sample + displayed
    plugin = _PLUGINS.get(syntax, "gdcm" if syntax in _GDCM else "")
    pixel, sample_byte = _DECODER_BYTES.get(plugin, (0, 1))
    return max(displayed, pixel + sample_byte * sample)


def is_compressed(syntax: UID) -> bool:
    """Return whether the pixel data is in one of the compressed encodings that are read."""
    return syntax in _PLUGINS or syntax in _GDCM


def is_justified(syntax: UID) -> bool:
    """Return whether decoding moves the samples to the low bits of their words; RLE keeps the words as they are."""
    return is_compressed(syntax) and syntax != RLELossless


def stored_words(dataset: Dataset) -> np.ndarray:
    """Decode the pixel data: `[H, W]` words as stored, integers, or floats for float pixel data.

    Raises:
        ReadError: a syntax without a decoder, or data that does not decode to the image of the header.
    """
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ReadError("the DICOM file holds no Pixel Data (7FE0,0010)")
    syntax = transfer_syntax(dataset)
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise ReadError(f"the DICOM transfer syntax is not supported: {uid_name(syntax) or 'unknown'}") from None
    header = _checked_header(dataset, syntax) if syntax.is_encapsulated else None
    decode = _decode_function(dataset, syntax, decoder, header)
    try:
        words = decode()
    except MemoryError:
        raise
    except Exception as error:  # decoders of five packages, each with its own classes
        raise ReadError(f"the DICOM pixel data ({syntax.name}) cannot be decoded: {_decoders_say(error)}") from None
    if words.ndim != 2:
        raise ReadError(f"the DICOM pixel data has shape {list(words.shape)}, not rows and columns")
    return words


def _decode_function(
    dataset: Dataset, syntax: UID, decoder: Decoder, header: Codestream | None
) -> "functools.partial[np.ndarray]":
    if syntax in _GDCM and not (syntax == JPEGExtended12Bit and header is not None and header.precision == 8):
        if importlib.util.find_spec("gdcm") is None:
            raise ReadError(_missing_decoder(syntax))
        return functools.partial(_with_gdcm, dataset, _GDCM[syntax])
    plugin = _PLUGINS.get(syntax, "")
    if syntax.is_encapsulated and plugin not in decoder.available_plugins:
        raise ReadError(_missing_decoder(syntax))
    # Words keep their unused bits: High Bit says where the sample lies, and pydicom ignores it.
    options = {"raw": True, "correct_unused_bits": False, "view_only": not syntax.is_encapsulated}
    return functools.partial(_with_pydicom, dataset, decoder, plugin, options)


def _with_pydicom(dataset: Dataset, decoder: Decoder, plugin: str, options: dict[str, Any]) -> np.ndarray:
    return decoder.as_array(dataset, index=0, decoding_plugin=plugin, **options)[0]


def _with_gdcm(dataset: Dataset, syntax: int) -> np.ndarray:
    rows, columns = dataset.Rows, dataset.Columns
    allocated = 8 if integer(dataset, "BitsAllocated", 16) <= 8 else 16
    data = get_frame(dataset.PixelData, 0, number_of_frames=1)
    samples = gdcm_child.decode_in_child(data, rows, columns, allocated, syntax, GDCM_SECONDS)
    return np.frombuffer(samples, f"u{allocated // 8}").reshape(rows, columns)


def _checked_header(dataset: Dataset, syntax: UID) -> Codestream | None:
    """Return the header of compressed data; raise ReadError where it does not fit, since decoders would believe it."""
    try:
        header = codestream_header(get_frame(dataset.PixelData, 0, number_of_frames=1))
    except ReadError:
        raise
    except Exception:  # not encapsulated, or cut off
        raise ReadError(f"the DICOM pixel data ({syntax.name}) is damaged") from None
    if header is None:
        return None
    if (header.rows, header.columns) != (dataset.Rows, dataset.Columns):
        raise ReadError(
            f"the compressed DICOM pixel data says {header.columns} x {header.rows} pixels, the header "
            f"{dataset.Columns} x {dataset.Rows}"
        )
    if header.components != 1:
        raise ReadError(f"the compressed DICOM pixel data is in color: it has {header.components} components")
    if header.precision > 8 * max(1, integer(dataset, "BitsAllocated", 16) // 8):
        raise ReadError(
            f"the compressed DICOM pixel data has {header.precision} bits, Bits Allocated (0028,0100) is "
            f"{dataset.BitsAllocated}"
        )
    return header


def _decoders_say(error: Exception) -> str:
    """Join what each decoder reported; pydicom puts one on a line below a general sentence."""
    lines = [line.strip() for line in str(error).splitlines()]
    return one_sentence(ValueError("; ".join(lines[1:]))) if len(lines) > 1 else one_sentence(error)


def _missing_decoder(syntax: UID) -> str:
    return f"no decoder for {syntax.name} is installed: pip install 'simsid[dicom]'"

"""Reads PNG, JPEG, TIFF and BMP files with Pillow."""

import io
import re
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from simsid.data.codestream import jpeg_header, jpeg_metadata, without_metadata
from simsid.data.decoded import (
    BUDGET,
    MAX_BYTES,
    DecodedImage,
    bands,
    check_memory,
    check_size,
    file_length,
    one_sentence,
    validated,
)
from simsid.data.directory import (
    COMPRESSION,
    MAX_PAGES,
    MAX_VALUE_BYTES,
    ORIENTATION,
    TILE_LENGTH,
    TILE_WIDTH,
    exif_orientation,
    read_directory,
)
from simsid.errors import ReadError

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
# EXIF orientations 2 to 8 as (transpose, flip rows, flip columns), applied in that order.
_ORIENTATIONS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
# Bytes of a pixel in Pillow's memory; every other mode has 4.
_STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2}

Grays = tuple[np.ndarray, tuple[float, float] | None, int]  # pixels, declared range, bits of a sample


def read_raster(file: BinaryIO, kind: str, max_pixels: int) -> DecodedImage:
    """Read a file of the format `kind`; `read_image` has the rules.

    Raises:
        ReadError: whatever keeps the file from being read.
    """
    if file_length(file) > MAX_BYTES:
        raise ReadError(f"the {kind} file is larger than the {MAX_BYTES / 1e6:.0f} MB allowed")
    extra = 0.0  # bytes a pixel that are held, first by the decoder
    beside = 0  # bytes of compressed data that are held
    turn = 0  # the orientation to apply, 0 for what Pillow's image says
    if kind == "JPEG":
        file, turn, extra = _checked_jpeg(file, max_pixels)
        beside = file_length(file)
    elif kind == "TIFF":
        turn, beside = _check_tiff(file, max_pixels)
    try:
        with Image.open(file, formats=_FORMATS) as image:
            check_size(image.height, image.width, max_pixels)
            pages = getattr(image, "n_frames", 1) if kind == "PNG" else 1
            if pages != 1:
                raise ReadError(_several(kind, str(pages)))
            turn = turn or _orientation(image.info)
            extra += _bytes_per_pixel(image, kind, turn)
            needed = check_memory(image.height, image.width, extra, max_pixels, beside)
            with BUDGET.reserve(needed):
                # Pillow has already turned a TIFF when it is loaded.
                return validated(_decoded(image, kind, 1 if kind == "TIFF" else turn))
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


def _several(kind: str, count: str) -> str:
    return f"the {kind} file holds {count} images; export the one that is meant"


def _checked_jpeg(file: BinaryIO, max_pixels: int) -> tuple[BinaryIO, int, float]:
    """Return the file without metadata, its orientation, and the bytes a pixel that its decoder needs.

    Pillow would parse EXIF and MPO directories while it opens the file, at a cost that the file chooses. The alternates
    of a phone's MPO, behind the end of the first image, go with them.
    """
    if file_length(file) > MAX_BYTES // 4:
        raise ReadError(f"the JPEG file is larger than the {MAX_BYTES / 4e6:.0f} MB allowed")
    data = file.read()
    header = jpeg_header(data)
    if header is None:
        raise ReadError("the JPEG header is damaged: it has no start of frame")
    check_size(header.rows, header.columns, max_pixels)
    exif = jpeg_metadata(data, b"Exif\0\0")
    xmp = jpeg_metadata(data, b"http://ns.adobe.com/xap/1.0/\0")
    # Where pixels arrive in several scans, libjpeg keeps a 16-bit coefficient for each sample.
    extra = 2.0 * header.components if header.progressive or header.scans > 1 else 0.0
    return io.BytesIO(without_metadata(data)), _orientation({"exif": exif, "xmp": xmp}), extra


def _check_tiff(file: BinaryIO, max_pixels: int) -> tuple[int, int]:
    """Refuse what would cost Pillow time or memory before it knows the size.

    Returns: the orientation, and the bytes of compressed data, which libtiff may hold at once.
    """
    directory = read_directory(file)
    file.seek(0)
    if directory.pages != 1:
        count = str(directory.pages) if directory.pages <= MAX_PAGES else f"more than {MAX_PAGES}"
        raise ReadError(_several("TIFF", count))
    if directory.value_bytes > MAX_VALUE_BYTES:
        raise ReadError(f"the TIFF header says {directory.value_bytes / 1e6:.0f} MB of tags")
    # A tile is decoded as one block, however small the image is.
    check_size(directory.numbers.get(TILE_LENGTH, 1), directory.numbers.get(TILE_WIDTH, 1), max_pixels)
    compressed = directory.numbers.get(COMPRESSION, 1) != 1
    return directory.numbers.get(ORIENTATION, 1), file_length(file) if compressed else 0


def _bytes_per_pixel(image: ImageFile.ImageFile, kind: str, turn: int) -> float:
    """Return the bytes a pixel that are held together: Pillow's image, its decoder's block, the result, a copy."""
    stored = _STORED_BYTES.get(image.mode, 4)
    signed = _tag(image, _SAMPLE_FORMAT, 1) == 2
    result = stored if image.mode.startswith("I;16") or image.mode in ("I", "F") else 4 if signed else 1
    block = stored if kind == "TIFF" else 0
    copy = 0 if turn == 1 else stored if kind == "TIFF" else result
    mask = 1 if "transparency" in image.info else 0
    # The block is gone when the result comes, and the copy of a turned result when Pillow's image has gone.
    return stored + max(block, copy if kind == "TIFF" else 0, result + mask) + (copy if kind != "TIFF" else 0)


def _decoded(image: ImageFile.ImageFile, kind: str, turn: int) -> DecodedImage:
    depth = _stored_bits(image, kind)
    raw = "" if kind == "BMP" else ",".join(str(tile[3]) for tile in image.tile)
    image.load()
    # Pillow scales samples of 2 and 4 bits to 8, not the one that is transparent.
    if raw in ("L;2", "L;4") and isinstance(image.info.get("transparency"), int):
        image.info["transparency"] *= 255 // (2 ** int(raw[2]) - 1)
    padding = None
    # A bitmap's "BGR;16" is 16 bits a pixel; "RGB;16B" and the like are 16 bits a channel.
    pixels, declared, bits = _gray(image, kind, depth, ";16" in raw)
    if pixels.dtype == np.uint16 and isinstance(key := image.info.get("transparency"), int):
        padding = pixels == key
        pixels[padding] = 0
        padding = _upright(padding, turn) if padding.any() and not padding.all() else None
    polarity = _tag(image, _PHOTOMETRIC, -1)
    # Pillow inverts WhiteIsZero for 8 bits only.
    if polarity == 0 and (bits > 8 or declared is None):
        low, high = declared or (float(pixels.min()), float(pixels.max()))
        np.subtract(pixels.dtype.type(low + high), pixels, out=pixels)
    return DecodedImage(
        pixels=_upright(pixels, turn),
        declared=declared,
        for_display=bits <= 8,
        bits=bits,
        format=kind,
        padding=padding,
        provenance={
            "bits_stored": bits,
            "mode": image.mode,
            "photometric_interpretation": {0: "WhiteIsZero", 1: "BlackIsZero"}.get(polarity, "")
            or ("grayscale" if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16") else "color"),
        },
    )


def _tag(image: ImageFile.ImageFile, number: int, default: int) -> int:
    """Return the first value of a TIFF tag, `default` where there is none and in every other format."""
    value = getattr(image, "tag_v2", {}).get(number, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _stored_bits(image: ImageFile.ImageFile, kind: str) -> int:
    """Return the bits of one sample as the header has it."""
    if kind == "TIFF":
        return _tag(image, _BITS_PER_SAMPLE, 1)
    return {"1": 1, "I": 16, "I;16": 16, "I;16B": 16}.get(image.mode, 8)


def _gray(image: ImageFile.ImageFile, kind: str, bits: int, wide: bool) -> Grays:
    """Return gray pixels, the declared range and the bits of a sample.

    Args:
        wide: whether the samples of the file have 16 bits.
    """
    if image.mode.startswith("I;16"):
        return _convert(image, np.uint16), (0.0, 2.0**bits - 1), bits
    if image.mode == "I":
        return _gray_from_int32(image, kind, bits)
    if image.mode == "F":
        return _convert(image, np.float32), None, 32
    if wide:
        raise ReadError(f"the {kind} file has 16 bits a channel in color or with transparency; save it as 16-bit gray")
    if image.mode in ("LAB", "HSV"):
        raise ReadError(f"the {kind} file is {image.mode} color; save it as gray")
    if bits == 8 and image.mode == "L" and _tag(image, _SAMPLE_FORMAT, 1) == 2:
        # Pillow takes signed bytes for unsigned ones.
        return _convert(image, np.float32, lambda band: np.asarray(band).view(np.int8)), (-128.0, 127.0), 8
    transparent = "A" in image.mode or "a" in image.mode or "transparency" in image.info
    return _convert(image, np.uint8, lambda band: _luma(band, transparent)), (0.0, 255.0), min(bits, 8)


def _gray_from_int32(image: ImageFile.ImageFile, kind: str, bits: int) -> Grays:
    """Unpack Pillow's mode I, which holds 16-bit PNG (before Pillow 11), signed 16-bit and 32-bit TIFF."""
    if kind != "TIFF":
        return _convert(image, np.uint16), (0.0, 65535.0), 16
    signed = _tag(image, _SAMPLE_FORMAT, 1) == 2
    if bits == 16:
        declared = (-32768.0, 32767.0) if signed else (0.0, 65535.0)
        return _convert(image, np.float32), declared, 16
    view = np.int32 if signed else np.uint32
    return _convert(image, np.float32, lambda band: np.asarray(band).view(view)), None, 32


def _convert(image: Image.Image, dtype: type, convert: Callable[[Image.Image], Any] = np.asarray) -> np.ndarray:
    """Convert a loaded image band by band: NumPy's view of a Pillow image is three copies of it."""
    pixels: np.ndarray = np.empty((image.height, image.width), dtype)
    for band in bands(image.height, image.width):
        pixels[band] = convert(image.crop((0, band.start, image.width, band.stop)))
    return pixels


def _luma(image: Image.Image, transparent: bool) -> Image.Image:
    """Return luma (ITU-R 601); what is transparent lies on black, the surround of a radiograph."""
    if transparent:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image).convert("RGB")
    if image.mode == "L":
        return image
    return (image if image.mode in ("1", "RGB") else image.convert("RGB")).convert("L")


def _orientation(info: dict[Any, Any]) -> int:
    """Return the orientation, 1 to 8, of EXIF data, ImageMagick's raw profile or XMP, in that order."""
    exif = info.get("exif") or b""
    profile = info.get("Raw profile type exif")
    if not exif and isinstance(profile, str):
        try:
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
        except ValueError:
            exif = b""
    if exif and (turn := exif_orientation(exif)) != 1:
        return turn
    xmp = info.get("xmp") or info.get("XML:com.adobe.xmp") or b""
    xmp = xmp.encode("utf-8", "replace") if isinstance(xmp, str) else xmp
    match = re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp)
    return int(match[1]) if match else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    transpose, rows, columns = _ORIENTATIONS.get(orientation, (False, False, False))
    if transpose:
        pixels = pixels.T
    return np.ascontiguousarray(pixels[:: -1 if rows else 1, :: -1 if columns else 1])

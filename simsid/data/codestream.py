"""Reads the headers of JPEG, JPEG-LS and JPEG 2000 data (size, precision, scans) before any decoder does."""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from simsid.errors import ReadError

# Encoders write about ten scans. Every scan passes over all pixels, so that a small file can take minutes.
MAX_SCANS = 50

# Within entropy-coded data, FF is followed by 00, by a restart marker or by another FF.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_WITHOUT_LENGTH = frozenset([0x01, *range(0xD0, 0xDA)]) - {0xD9}
# Start of frame: C0 to CF without the tables' C4, C8 and CC; F7 in JPEG-LS.
_FRAMES = frozenset([*range(0xC0, 0xD0), 0xF7]) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset([0xC2, 0xC6, 0xCA, 0xCE])
# Not needed to decode, and parsed by decoders at great cost when damaged: APP1 to APP13, APP15, comments.
_METADATA = frozenset([*range(0xE1, 0xF0), 0xFE]) - {0xEE}


@dataclass(frozen=True)
class Codestream:
    """The header of compressed data; `scans` is 1 for JPEG 2000."""

    rows: int
    columns: int
    components: int
    precision: int
    progressive: bool = False
    scans: int = 1


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of each segment up to the end of image; a scan's includes its entropy-coded data.

    Bytes between segments are passed over, as decoders do.
    """
    position = 0
    while match := _MARKER.search(data, position):
        start, marker = match.start(), data[match.start() + 1]
        if marker == 0xD9:
            yield marker, start, start + 2
            return
        position = start + 2
        if marker not in _WITHOUT_LENGTH:
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
        if marker == 0xDA:
            following = _MARKER.search(data, position)
            position = following.start() if following else len(data)
        yield marker, start, min(position, len(data))


def jpeg_header(data: bytes) -> Codestream | None:
    """Return the header of JPEG or JPEG-LS data; `None` where there is no start of frame.

    Raises:
        ReadError: more than `MAX_SCANS` scans, or two frames.
    """
    frame = None
    scans = 0
    for marker, start, _ in jpeg_segments(data):
        scans += marker == 0xDA
        if scans > MAX_SCANS:
            raise ReadError(f"the JPEG data has more than {MAX_SCANS} scans")
        if marker in _FRAMES and len(data) >= start + 10:
            if frame:
                raise ReadError("the JPEG data has two frames")
            frame = (marker, *struct.unpack_from(">BHHB", data, start + 4))
    if not frame:
        return None
    marker, precision, rows, columns, components = frame
    return Codestream(rows, columns, components, precision, marker in _PROGRESSIVE, scans)


def without_metadata(data: bytes) -> bytes:
    """Return JPEG data without EXIF, ICC, XMP, comments and whatever follows the end of image."""
    return b"".join(data[start:end] for marker, start, end in jpeg_segments(data) if marker not in _METADATA)


def jpeg_metadata(data: bytes, prefix: bytes) -> bytes:
    """Return the first APP1 segment that starts with `prefix`, without it; empty where there is none."""
    for marker, start, end in jpeg_segments(data):
        if marker == 0xDA:
            break
        if marker == 0xE1 and data.startswith(prefix, start + 4):
            return data[start + 4 + len(prefix) : end]
    return b""


def codestream_header(data: bytes) -> Codestream | None:
    """Return the header of JPEG, JPEG-LS or JPEG 2000 data, `None` where it does not start as these do.

    Raises:
        ReadError: as `jpeg_header`.
        struct.error: JPEG 2000 data that ends within its header.
    """
    # JPEG 2000: SOC, then SIZ with the far corner and the offset of the image.
    start = data.find(b"\xff\x4f\xff\x51", 0, 2**16)
    if start == 0 or (start > 0 and data[4:8] == b"jP  "):
        right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
        components, precision = struct.unpack_from(">HB", data, start + 40)
        return Codestream(bottom - top, right - left, components, (precision & 0x7F) + 1)
    return jpeg_header(data) if data[:2] == b"\xff\xd8" else None

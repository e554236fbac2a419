"""Peak memory of decoding and preprocessing one file, measured in a process of its own."""

import io
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)
from sample_files import compressed_dicom, dicom, gdcm_dicom, jpeg_dicom, save, write_dicom

from simsid.data.decoded import MAX_BYTES

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures in Linux's units")
SCRIPT = pathlib.Path(__file__).with_name("peak_memory.py")
TWELVE = {"BitsStored": 12, "HighBit": 11}
SIDE = 2000
# Tables, band buffers and libraries that are loaded at the first use: the same for an image of any size.
FIXED = 30_000_000


def measured(paths):
    """Return of each file the bytes reserved, the peaks of reading and of all, and the bytes of the image read."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, paths)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    lines = [line.split("\t") for line in output.splitlines()]
    assert [line[3] for line in lines] == [str(path) for path in paths]
    return [tuple(int(number) for number in (*line[:3], line[4])) for line in lines]


def files(folder):
    """Write one image of every kind whose decoder needs another amount of memory."""
    gray = (np.arange(SIDE)[:, None] // 8 + np.arange(SIDE) // 8).astype(np.uint16)
    byte = gray.astype(np.uint8)
    color, alpha = np.dstack([byte] * 3), np.dstack([byte] * 4)
    exif = Image.Exif()
    exif[274] = 6
    options = {"compress_level": 1}
    for name, pixels in (("gray", byte), ("deep", gray), ("color", color), ("alpha", alpha)):
        yield save(folder / f"{name}.png", pixels, **options)
    yield save(folder / "turned.png", gray, exif=exif, **options)
    for name, pixels in (("gray", byte), ("deep", gray), ("color", color), ("float", gray.astype(np.float32))):
        yield save(folder / f"{name}.tif", pixels, compression="tiff_lzw")
    yield save(folder / "turned.tif", gray, compression="tiff_lzw", exif=exif)
    yield save(folder / "gray.jpg", byte)
    yield save(folder / "progressive.jpg", color, progressive=True, subsampling=0)
    yield save(folder / "gray.bmp", byte)
    window = {"WindowCenter": 200, "WindowWidth": 300, "PixelPaddingValue": 0}
    yield write_dicom(folder / "native", gray, **TWELVE, **window)
    yield write_dicom(folder / "byte", byte)
    yield write_dicom(folder / "word32", gray.astype(np.uint32))
    double = dicom(gray)
    del double.PixelData, double.BitsStored, double.HighBit, double.PixelRepresentation
    double.BitsAllocated = 64
    double.DoubleFloatPixelData = gray.astype(np.float64).tobytes()
    double.save_as(folder / "double", enforce_file_format=True)
    yield folder / "double"
    deflated = dicom(gray, **TWELVE)
    deflated.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    deflated.save_as(folder / "deflated", enforce_file_format=True)
    yield folder / "deflated"
    buffer = io.BytesIO()
    Image.fromarray(byte).save(buffer, "JPEG", progressive=True)
    yield jpeg_dicom(folder / "jpeg", byte, buffer.getvalue(), JPEGBaseline8Bit)
    for name, syntax in (("rle", RLELossless), ("jpeg-ls", JPEGLSLossless), ("jpeg-2000", JPEG2000Lossless)):
        yield compressed_dicom(folder / name, syntax, gray, **TWELVE)
    yield compressed_dicom(folder / "jpeg-2000-byte", JPEG2000Lossless, byte)
    yield gdcm_dicom(folder / "lossless", gray, "JPEGLosslessProcess14_1", **TWELVE)


def test_no_file_takes_more_memory_than_is_reserved_for_it_nor_512_megabytes(tmp_path):
    for module in ("gdcm", "openjpeg", "jpeg_ls"):
        pytest.importorskip(module, reason="needs the decoders of the extra 'dicom'")
    paths = list(files(tmp_path))
    # The largest DICOM image of 16 bits that is accepted; most of its memory is the result.
    line = (np.arange(10_000) // 64).astype(np.uint16)
    window = {"PixelPaddingValue": 0}
    paths.append(write_dicom(tmp_path / "largest", np.broadcast_to(line, (5_300, 10_000)), **TWELVE, **window))
    rows = measured(paths)
    for path, row in zip(paths, rows):
        print(f"{path.name:16} MB reserved, read, peak, image:", *(f"{number / 1e6:6.1f}" for number in row))
    assert not [path.name for path, (reserved, read, _, _) in zip(paths, rows) if read > reserved + FIXED]
    _, read, peak, image = rows[-1]
    assert image == 4 * 5_300 * 10_000
    assert image < read < peak < 512_000_000
    assert MAX_BYTES + FIXED <= 512_000_000

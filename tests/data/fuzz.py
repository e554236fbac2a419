"""Reads damaged files of every kind: each must give a finite image or one ReadError, within a time limit.

    python tests/data/fuzz.py --files 10000 --seed 1         the long version: 10,000 damaged files of each kind
    python tests/data/fuzz.py --kinds jpeg-ls --only 1234    one file again, by the number that a failure printed

File `n` of a kind is damaged by a generator seeded with (seed, n): cut off, bytes replaced, inserted or removed, header
fields set to their extremes. The suite runs a few hundred files a kind. A crash of the process leaves the last line
of the output as the file that caused it.
"""

import argparse
import io
import pathlib
import signal
import sys
import tempfile
import time
import zlib

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)
from sample_files import (
    assert_sentence,
    compressed_dicom,
    dicom,
    gdcm_dicom,
    jpeg_dicom,
    look_up_table,
    save,
    write_dicom,
)

from simsid.data import read_image
from simsid.errors import ReadError

SECONDS = 20
MAX_PIXELS = 1_000_000
DEEP = {"BitsStored": 12, "HighBit": 11}
SLOW = {"dicom-jpeg-lossless": 25, "dicom-jpeg-12-bit": 25}
"""Kinds that take a process for each file get a fraction of the files, one in so many."""


class TooSlowError(BaseException):
    """Not an Exception, which a reader could take for damage."""


def noise(top, dtype):
    return np.random.default_rng(0).integers(0, top, (48, 64)).astype(dtype)


def raster_files(folder):
    """Yield an intact file of each kind that Pillow reads, by the name of the kind."""
    byte, deep = noise(256, np.uint8), noise(65536, np.uint16)
    color = np.dstack([byte] * 3)
    exif = Image.Exif()
    exif[274] = 6
    exif[305] = "software"
    yield "png", save(folder / "a.png", byte, exif=exif)
    yield "png-16-bit", save(folder / "b.png", deep)
    yield "png-palette", save(folder / "c.png", Image.fromarray(color).quantize(16), transparency=3)
    yield "jpeg", save(folder / "a.jpg", byte, exif=exif)
    yield "jpeg-progressive", save(folder / "b.jpg", color, progressive=True)
    yield "tiff", save(folder / "a.tif", byte, exif=exif)
    yield "tiff-lzw-16-bit", save(folder / "b.tif", deep, compression="tiff_lzw")
    yield "tiff-jpeg", save(folder / "c.tif", color, compression="jpeg")
    yield "tiff-float", save(folder / "d.tif", deep.astype(np.float32), compression="tiff_deflate")
    yield "bmp", save(folder / "a.bmp", byte)


def dicom_files(folder):
    """Yield an intact DICOM file of each encoding, by the name of the kind."""
    byte, deep = noise(256, np.uint8), noise(4096, np.uint16)
    window = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 2000, "WindowWidth": 900}
    yield "dicom", write_dicom(folder / "a", deep, **DEEP, **window, PixelPaddingValue=7)
    tables = {"VOILUTSequence": look_up_table(np.arange(4096), 0, 12)}
    yield "dicom-table", write_dicom(folder / "b", deep, **DEEP, **tables, PhotometricInterpretation="MONOCHROME1")
    group = Dataset()
    group.FrameVOILUTSequence = Sequence([Dataset()])
    group.FrameVOILUTSequence[0].WindowCenter, group.FrameVOILUTSequence[0].WindowWidth = 2000, 900
    yield "dicom-groups", write_dicom(folder / "c", deep, **DEEP, PerFrameFunctionalGroupsSequence=Sequence([group]))
    for name, syntax in (("implicit", ImplicitVRLittleEndian), ("deflated", DeflatedExplicitVRLittleEndian)):
        dataset = dicom(deep, **DEEP)
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(folder / name, enforce_file_format=True)
        yield f"dicom-{name}", folder / name
    buffer = io.BytesIO()
    Image.fromarray(byte).save(buffer, "JPEG", progressive=True)
    yield "dicom-jpeg", jpeg_dicom(folder / "d", byte, buffer.getvalue(), JPEGBaseline8Bit)
    yield "dicom-rle", compressed_dicom(folder / "e", RLELossless, deep, **DEEP)
    yield "dicom-jpeg-ls", compressed_dicom(folder / "f", JPEGLSLossless, deep, **DEEP)
    yield "dicom-jpeg-2000", compressed_dicom(folder / "g", JPEG2000Lossless, deep, **DEEP)
    yield "dicom-jpeg-lossless", gdcm_dicom(folder / "h", deep, "JPEGLosslessProcess14_1", **DEEP)
    yield "dicom-jpeg-12-bit", gdcm_dicom(folder / "i", deep, "JPEGExtendedProcess2_4", **DEEP)


def damaged(data, generator):
    """Return damaged bytes, headers more often than pixels, where damage often gives another valid image."""
    data = bytearray(data)

    # Compressed DICOM data lies behind its header, PNG and JPEG data at the front.
    def position():
        return int(generator.integers(0, min(len(data), int(generator.choice([200, 1500, 10**6])))))

    kind = int(generator.integers(0, 6))
    if kind == 0:
        return bytes(data[: position()])
    for _ in range(int(generator.integers(1, 6))):
        where = position()
        if kind == 1:
            data[where] = int(generator.integers(0, 256))
        elif kind == 2:
            data[where] ^= 1 << int(generator.integers(0, 8))
        elif kind == 3:
            size = int(generator.choice([2, 4]))
            data[where : where + size] = int(
                generator.choice([0, 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1])
            ).to_bytes(size, "little")
        elif kind == 4:
            data[where:where] = generator.integers(0, 256, int(generator.integers(1, 20))).astype(np.uint8).tobytes()
        else:
            del data[where : where + int(generator.integers(1, 20))]
            if not data:
                break
    return bytes(data)


def with_checksums(data):
    """Return PNG data whose chunks have the right check sums: without them every damage is found at once."""
    data = bytearray(data)
    position = 8
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        data[end : end + 4] = zlib.crc32(data[position + 4 : end]).to_bytes(4, "big") if end + 4 <= len(data) else b""
        position = end + 4
    return bytes(data)


def outcome(path):
    """Read a file and return `"image"` or `"refused"`; anything else that happens is raised."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        image = read_image(path, max_pixels=MAX_PIXELS)
    except ReadError as error:
        assert_sentence(str(error))
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert image.pixels.ndim == 2
    assert image.pixels.size <= MAX_PIXELS
    assert image.pixels.dtype in (np.uint8, np.uint16, np.float32)
    assert np.isfinite(image.pixels).all()
    assert image.pixels.min() < image.pixels.max()
    assert all(isinstance(value, (str, int, float)) for value in image.provenance.values())
    return "image"


def fuzz(kind, data, numbers, seed, path):
    """Read the damaged files of these numbers; print the numbers first, so that a crash can be repeated."""
    print(f"{kind}: seed {seed}, files {numbers[0]} to {numbers[-1]}", end=" ", flush=True)
    counts = {"image": 0, "refused": 0}
    slowest = 0.0
    for n in numbers:
        bad = damaged(data, np.random.default_rng((seed, n)))
        path.write_bytes(with_checksums(bad) if kind.startswith("png") and n % 2 else bad)
        start = time.monotonic()
        try:
            counts[outcome(path)] += 1
        except BaseException:
            print(f"FAILED: --kinds {kind} --seed {seed} --only {n}", flush=True)
            raise
        slowest = max(slowest, time.monotonic() - start)
    print(f"-> {counts['image']} images, {counts['refused']} refused, slowest {slowest:.2f} s", flush=True)


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=300, help="damaged files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of one file")
    parser.add_argument("--kinds", nargs="*", help="kinds to damage, all by default")
    options = parser.parse_args(arguments)

    def too_slow(*_):
        raise TooSlowError(f"a file took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_slow)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for kind, path in [*raster_files(folder), *dicom_files(folder)]:
            if options.kinds and kind not in options.kinds:
                continue
            assert outcome(path) == "image", kind
            files = max(1, options.files // SLOW.get(kind, 1))
            numbers = range(files) if options.only is None else [options.only]
            fuzz(kind, path.read_bytes(), numbers, options.seed, folder / "damaged")


if __name__ == "__main__":
    main(sys.argv[1:])

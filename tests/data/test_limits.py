"""Small files that would cost a reader minutes or gigabytes are refused before they do."""

import io
import struct
import threading
import time
import tracemalloc
import zlib

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit
from sample_files import dicom, jpeg_dicom, png_chunk, ramp, refused, save, write_dicom, write_png, write_tiff

import simsid.data.dicom
import simsid.data.raster
from simsid.data import read_image
from simsid.data.codestream import MAX_SCANS, jpeg_header
from simsid.data.decoded import MAX_BYTES, MAX_SIDE, MemoryBudget
from simsid.data.dicom import check_inflated_size
from simsid.errors import ReadError

DEEP = ramp(16, 24, 4095, np.uint16)


@pytest.fixture(autouse=True)
def few_seconds():
    """Every case here took much longer before its limit."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 30


def test_side_and_memory_are_limited_from_the_header(tmp_path):
    refused(write_png(tmp_path / "a.png", MAX_SIDE + 1, 2, 8, 0, b""), f"more than the {MAX_SIDE} allowed on a side")
    refused(write_dicom(tmp_path / "b", DEEP, Rows=MAX_SIDE + 1, Columns=1), "allowed on a side")
    # As many pixels are allowed, but not of four bytes each beside the result.
    for color, name in ((2, "RGB"), (6, "RGBA")):
        refused(write_png(tmp_path / name, 9900, 9900, 8, color, b""), "needs 490 MB, more than the 480 MB allowed")
    refused(write_dicom(tmp_path / "c", DEEP, Rows=10000, Columns=9000), "needs 720 MB, more than the 480 MB")


def test_larger_pixel_limit_raises_the_memory_limit(tmp_path):
    path = write_dicom(tmp_path / "c", DEEP, Rows=10000, Columns=9000)
    refused(path, "less than expected", max_pixels=200_000_000)


def test_tile_larger_than_the_pixel_limit_is_refused(tmp_path):
    path = save(tmp_path / "a.tif", ramp(), compression="tiff_deflate")
    data = path.read_bytes()
    position = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, position)[0]
    entries = data[position + 2 : position + 2 + 12 * count]
    tiles = struct.pack("<HHII", 322, 4, 1, 20000) + struct.pack("<HHII", 323, 4, 1, 20000)
    path.write_bytes(
        data[:4] + struct.pack("<I", len(data)) + data[8:] + struct.pack("<H", count + 2) + entries + tiles
    )
    refused(path, "20000 x 20000 pixels, more than the 100 million")


def many_directories(path, count):
    """A TIFF of `count` directories; all but the first are empty."""
    write_tiff(path, ramp())
    data = path.read_bytes()
    first = len(data)
    chain = b"".join(struct.pack("<HI", 0, first + 6 * (i + 1)) for i in range(count - 2)) + struct.pack("<HI", 0, 0)
    path.write_bytes(data[:-4] + struct.pack("<I", first) + chain)
    return path


def test_directories_are_counted_up_to_a_limit(tmp_path):
    refused(many_directories(tmp_path / "a.tif", 100_000), "TIFF file holds more than 10 images")
    refused(many_directories(tmp_path / "b.tif", 3), "TIFF file holds 3 images")
    # The chain that points into itself ends there; a damaged link ends it too.
    path = write_tiff(tmp_path / "c.tif", ramp())
    data = path.read_bytes()
    path.write_bytes(data[:-4] + struct.pack("<I", 2**31))
    assert np.array_equal(read_image(path).pixels, ramp())
    path.write_bytes(data[:-4] + data[4:8])
    refused(path, "TIFF file holds 2 images")


def overlapping_values(count, size):
    """The entries of a directory whose values all lie in the same `size` bytes."""
    return b"".join(struct.pack("<HHII", 50000 + i, 7, size, 8) for i in range(count))


def test_values_of_a_directory_are_summed_before_they_are_loaded(tmp_path):
    entries = overlapping_values(10000, 500_000)
    data = b"II*\0" + struct.pack("<I", 500_008) + bytes(500_000) + struct.pack("<H", 10000) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(data)
    refused(tmp_path / "a.tif", "TIFF header says 5000 MB of tags")
    # The same in the EXIF directory, which Pillow loads with the image.
    path = write_tiff(tmp_path / "b.tif", ramp())
    tiff = path.read_bytes()
    position = struct.unpack_from("<I", tiff, 4)[0]
    count = struct.unpack_from("<H", tiff, position)[0]
    directory = struct.pack("<H", count + 1) + tiff[position + 2 : position + 2 + 12 * count]
    end = len(tiff)
    link = struct.pack("<HHII", 34665, 4, 1, end + len(directory) + 16)
    exif = struct.pack("<H", 10000) + overlapping_values(10000, 500_000) + bytes(4)
    path.write_bytes(tiff[:4] + struct.pack("<I", end) + tiff[8:] + directory + link + bytes(4) + exif)
    refused(path, "TIFF header says 5000 MB of tags")


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_exif_data_is_not_loaded_beside_the_orientation(tmp_path, name):
    size = 60_000
    entries = struct.pack("<HHIHH", 274, 3, 1, 3, 0) + overlapping_values(4000, size)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + struct.pack("<H", 4001) + entries + bytes(4)
    path = save(tmp_path / name, ramp())
    data = path.read_bytes()
    if name == "a.jpg":
        data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    else:
        data = data[:33] + png_chunk(b"eXIf", exif[6:] + bytes(size)) + data[33:]
    path.write_bytes(data)
    tracemalloc.start()
    pixels = read_image(path).pixels
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.abs(pixels.astype(int) - ramp()[::-1, ::-1]).max() <= 5
    assert peak < 20_000_000


def many_scans(pixels, count):
    """Progressive JPEG data with the last scan repeated."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def test_scans_are_counted_before_decoding(tmp_path, monkeypatch):
    data = many_scans(ramp(64, 64), 1000)
    (tmp_path / "a.jpg").write_bytes(data)
    monkeypatch.setattr(simsid.data.raster.Image, "open", None)
    refused(tmp_path / "a.jpg", f"more than {MAX_SCANS} scans")
    refused(jpeg_dicom(tmp_path / "b", ramp(64, 64), data, JPEGBaseline8Bit), f"more than {MAX_SCANS} scans")


def test_usual_progressive_jpeg_is_read(tmp_path):
    for name, options in (("a.jpg", {"progressive": True}), ("b.jpg", {})):
        path = save(tmp_path / name, np.dstack([ramp(64, 64)] * 3), quality=95, **options)
        assert np.abs(read_image(path).pixels.astype(int) - ramp(64, 64)).max() <= 4
        header = jpeg_header(path.read_bytes())
        assert (header.rows, header.columns, header.components, header.precision) == (64, 64, 3, 8)
        assert header.progressive == (name == "a.jpg")
    # A thumbnail's markers within EXIF data are not the image's.
    data = (tmp_path / "b.jpg").read_bytes()
    thumbnail = b"Exif\0\0" + many_scans(ramp(8, 8), 80)
    with_thumbnail = data[:2] + b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + data[2:]
    (tmp_path / "c.jpg").write_bytes(with_thumbnail + data)
    assert np.array_equal(read_image(tmp_path / "c.jpg").pixels, read_image(tmp_path / "b.jpg").pixels)


def deflated(path, size, **elements):
    """Write a deflated DICOM file with `size` zero bytes in a private element."""
    dataset = dicom(DEEP, **elements)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    if size:
        dataset.add_new((0x0029, 0x0010), "LO", "padding")
        dataset.add_new((0x0029, 0x1000), "OB", b"\0" * size)
    dataset.save_as(path, enforce_file_format=True)
    return path.read_bytes()


def test_deflated_data_is_bounded_whatever_the_layout_of_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr(simsid.data.dicom, "_LONGEST_HEADER", 3_000_000)
    data = deflated(tmp_path / "a", 40_000_000)
    assert len(data) < 200_000
    length = int.from_bytes(data[140:144], "little")
    meta, rest = data[144 : 144 + length], data[144 + length :]
    assert data[132:140] == b"\2\0\0\0UL\4\0"
    group = data[132:140]
    filler = b"\2\0\2\1OB\0\0" + struct.pack("<I", 4000) + bytes(4000)
    layouts = {
        "usual": data,
        "no group length": data[:132] + meta + rest,
        "UID far behind": data[:132] + filler + meta + rest,
        "no preamble": data[132:],
        "lying group length, short": data[:132] + group + struct.pack("<I", length - 30) + meta + rest,
        "lying group length, long": data[:132] + group + struct.pack("<I", length + 30) + meta + rest,
    }
    for name, layout in layouts.items():
        (tmp_path / "b").write_bytes(layout)
        tracemalloc.start()
        refused(tmp_path / "b", "deflated DICOM data set is larger than the 3 MB allowed", max_pixels=1000)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000, name
        tracemalloc.stop()
        small = deflated(tmp_path / "c", 0)
        (tmp_path / "c").write_bytes(layout.replace(rest, small[-(len(small) - 144 - length) :]))
        assert np.array_equal(read_image(tmp_path / "c").pixels, DEEP), name


def test_check_of_deflated_data_ends_at_every_size_and_with_bytes_behind():
    generator = np.random.default_rng(0)
    for size in [*range(60), 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20]:
        data = generator.integers(0, 4, min(size, 1000)).astype(np.uint8).tobytes()
        data = (data * (size // 1000 + 1))[:size]
        compressor = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
        stream = compressor.compress(data) + compressor.flush()
        for behind in (b"", b"\0", b"\0" * 500_000):
            check_inflated_size(stream + behind, size)
            if size:
                with pytest.raises(ReadError, match="larger"):
                    check_inflated_size(stream + behind, size - 1)
        with pytest.raises(ReadError, match="cut off"):
            check_inflated_size(stream[:-1], size)
    with pytest.raises(ReadError, match="damaged"):
        check_inflated_size(b"\xff" * 100, 10**6)


@pytest.mark.parametrize("columns", range(24, 84, 2))
def test_deflated_image_of_any_size_is_read(tmp_path, columns):
    pixels = ramp(16, columns, 4095, np.uint16)
    dataset = dicom(pixels)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(tmp_path / "a", enforce_file_format=True)
    assert np.array_equal(read_image(tmp_path / "a").pixels, pixels)


def test_endless_elements_are_refused(tmp_path, monkeypatch):
    dataset = dicom(DEEP)
    dataset.add_new("PhotometricInterpretation", "UT", "MONOCHROME2" + " " * 100_000)
    dataset.save_as(tmp_path / "a", enforce_file_format=True)
    refused(tmp_path / "a", r"Photometric Interpretation \(0028,0004\) has 100\d\d\d bytes")
    # Nested items of an undefined length: each is several objects once parsed.
    item = b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + b"\x08\0\x05\0CS\0\0" * 2 + b"\xfe\xff\x0d\xe0\0\0\0\0"
    sequence = b"\x09\0\x10\x10SQ\0\0\xff\xff\xff\xff" + item * 30_000 + b"\xfe\xff\xdd\xe0\0\0\0\0"
    data = write_dicom(tmp_path / "b", DEEP).read_bytes()
    position = data.index(b"\x10\0\x10\0PN")
    # A megabyte within a sequence of undefined length, which is read in full.
    large = b"\x09\0\x11\x10OB\0\0" + struct.pack("<I", 2**20) + bytes(2**20)
    sequence_of_one = b"\x09\0\x10\x10SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" + large
    sequence_of_one += b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    (tmp_path / "c").write_bytes(data[:position] + sequence_of_one + data[position:])
    assert np.array_equal(read_image(tmp_path / "c").pixels, DEEP)
    with monkeypatch.context() as patch:
        patch.setattr(simsid.data.dicom, "_LONGEST_HEADER", 2**20)
        refused(tmp_path / "c", "header is too long")
    (tmp_path / "b").write_bytes(data[:position] + sequence + data[position:])
    refused(tmp_path / "b", "too many elements")


def test_fragments_are_counted(tmp_path):
    dataset = pydicom.dcmread(jpeg_dicom(tmp_path / "a", ramp(), b"\0" * 10, JPEGBaseline8Bit))
    dataset.PixelData = b"\xfe\xff\x00\xe0\0\0\0\0" + b"\xfe\xff\x00\xe0\2\0\0\0ab" * 110_000
    dataset.save_as(tmp_path / "a")
    refused(tmp_path / "a", "too many elements")


def test_budget_admits_in_order_and_a_large_file_alone():
    budget = MemoryBudget(100)
    held, most, log = [], [], []
    lock = threading.Lock()

    def work(amount):
        with budget.reserve(amount):
            with lock:
                held.append(min(amount, 100))
                most.append(sum(held))
                log.append(amount)
            time.sleep(0.01)
            with lock:
                held.remove(min(amount, 100))

    threads = [threading.Thread(target=work, args=(amount,)) for amount in (40, 40, 500, 40, 40, 40, 100, 1, 99)]
    for thread in threads:
        thread.start()
        time.sleep(0.002)
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert len(log) == len(threads)
    assert max(most) <= 100
    assert log.index(500) < log.index(99), "the large file waits for those before it only"


def test_reader_reserves_memory_and_releases_it_after_errors(tmp_path, monkeypatch):
    amounts = []
    budget = MemoryBudget(MAX_BYTES)

    class Watched:
        def reserve(self, amount):
            amounts.append(amount)
            return budget.reserve(amount)

    monkeypatch.setattr("simsid.data.raster.BUDGET", Watched())
    monkeypatch.setattr("simsid.data.dicom.BUDGET", Watched())
    read_image(save(tmp_path / "a.png", ramp(100, 100)))
    read_image(write_dicom(tmp_path / "b", ramp(100, 100, 4095, np.uint16)))
    refused(write_dicom(tmp_path / "c", DEEP, PixelData=DEEP.tobytes()[:-40]), "less than expected")
    assert amounts[0] == 20_000
    assert 80_000 <= amounts[1] <= 82_000
    assert len(amounts) == 3
    with budget.reserve(MAX_BYTES):  # nothing is held any more
        pass

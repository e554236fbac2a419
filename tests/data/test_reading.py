"""PNG, JPEG, TIFF and BMP files of every kind are read at their depth, and others refused in one sentence."""

import contextlib
import io
import os
import shutil
import struct
import threading
import warnings

import numpy as np
import pytest
from PIL import Image, ImageCms
from sample_files import assert_sentence, png_chunk, ramp, refused, save, write_dicom, write_png, write_tiff

from simsid.data import load_images, read_image
from simsid.data.reading import MAX_PIXELS
from simsid.errors import ReadError


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "PNG"), ("a.bmp", "BMP"), ("a.tif", "TIFF"), ("a.tiff", "TIFF"), ("a.jpeg", "JPEG")]
)
def test_eight_bit_pixels_are_unchanged(tmp_path, name, kind):
    image = read_image(save(tmp_path / name, ramp()))
    assert (image.format, image.bits, image.for_display, image.declared) == (kind, 8, True, (0.0, 255.0))
    assert image.pixels.dtype == np.uint8
    assert image.pixels.shape == (12, 20)
    assert np.abs(image.pixels.astype(int) - ramp()).max() <= (5 if kind == "JPEG" else 0)


@pytest.mark.parametrize("extension", ["png", "jpg", "tif", "bmp"])
def test_format_is_recognized_by_content_not_by_extension(tmp_path, extension):
    for kind in ("PNG", "JPEG", "TIFF", "BMP"):
        path = tmp_path / f"{kind}.{extension}"
        Image.fromarray(ramp()).save(path, format=kind)
        assert read_image(path).format == kind
    bare = tmp_path / "bare"
    write_dicom(bare, ramp())
    assert read_image(bare).format == "DICOM"
    shutil.copy(bare, tmp_path / f"dicom.{extension}")
    assert read_image(tmp_path / f"dicom.{extension}").format == "DICOM"


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_keep_their_depth(tmp_path, name):
    deep = ramp(300, 300, 65535, np.uint16)
    image = read_image(save(tmp_path / name, deep))
    assert (image.bits, image.for_display, image.declared) == (16, False, (0.0, 65535.0))
    assert np.array_equal(image.pixels, deep)
    assert len(np.unique(image.pixels)) > 1000


@pytest.mark.parametrize("compression", [None, "tiff_deflate", "tiff_lzw"])
def test_sixteen_bit_tiff_is_read_in_both_byte_orders(tmp_path, compression):
    deep = ramp(top=65535, dtype=np.uint16)
    little = save(tmp_path / "little.tif", deep, compression=compression)
    assert np.array_equal(read_image(little).pixels, deep)
    big = tmp_path / "big.tif"
    write_tiff(big, deep, order=">")
    assert big.read_bytes()[:2] == b"MM"
    image = read_image(big)
    assert np.array_equal(image.pixels, deep)
    assert image.pixels.dtype == np.uint16
    assert image.pixels.dtype.isnative


def test_white_is_zero_is_inverted_at_every_depth(tmp_path):
    assert np.array_equal(read_image(write_tiff(tmp_path / "8.tif", ramp(), photometric=0)).pixels, 255 - ramp())
    deep = ramp(top=65535, dtype=np.uint16)
    assert np.array_equal(read_image(write_tiff(tmp_path / "16.tif", deep, photometric=0)).pixels, 65535 - deep)
    floats = ramp(top=7).astype(np.float32)
    image = read_image(write_tiff(tmp_path / "float.tif", floats, photometric=0, sample_format=3))
    assert np.array_equal(image.pixels, 7 - floats)


def test_signed_and_32_bit_tiff_keep_their_values(tmp_path):
    small = (ramp().astype(np.int16) - 128).astype(np.int8)
    image = read_image(write_tiff(tmp_path / "small.tif", small, sample_format=2))
    assert (image.declared, image.bits, image.for_display) == ((-128.0, 127.0), 8, True)
    assert np.array_equal(image.pixels, small)
    signed = (ramp(top=60000, dtype=np.int32) - 30000).astype(np.int16)
    image = read_image(write_tiff(tmp_path / "signed.tif", signed, sample_format=2))
    assert image.declared == (-32768.0, 32767.0)
    assert np.array_equal(image.pixels, signed.astype(np.float32))
    wide = ramp(top=4_000_000_000, dtype=np.uint32)
    image = read_image(write_tiff(tmp_path / "wide.tif", wide))
    assert (image.declared, image.bits, image.for_display) == (None, 32, False)
    assert np.allclose(image.pixels, wide.astype(np.float64), rtol=1e-7)


def test_float_tiff_is_kept_and_must_be_finite(tmp_path):
    values = ramp(top=1, dtype=np.float64).astype(np.float32) + ramp().astype(np.float32) / 7
    image = read_image(save(tmp_path / "a.tif", values))
    assert (image.declared, image.for_display) == (None, False)
    assert np.array_equal(image.pixels, values)
    values[3, 4] = np.nan
    refused(save(tmp_path / "b.tif", values), "NaN")


def test_one_bit_is_black_and_white(tmp_path):
    mask = ramp() > 100
    for name in ("a.png", "a.tif", "a.bmp"):
        image = read_image(save(tmp_path / name, Image.fromarray(mask)))
        assert (image.bits, image.declared) == (1, (0.0, 255.0))
        assert np.array_equal(image.pixels, mask * np.uint8(255))


def test_palette_is_looked_up(tmp_path):
    image = Image.fromarray(ramp(top=15))
    image.putpalette([value for i in range(16) for value in [255 - 10 * i] * 3])
    assert image.mode == "P"
    assert np.array_equal(read_image(save(tmp_path / "a.png", image)).pixels, 255 - 10 * ramp(top=15))


def test_gray_stored_as_color_is_unchanged_and_color_becomes_luma(tmp_path):
    gray = np.repeat(ramp()[..., None], 3, 2)
    assert np.array_equal(read_image(save(tmp_path / "gray.png", gray)).pixels, ramp())
    red = np.zeros((4, 4, 3), np.uint8)
    red[:2, :, 0] = 200
    pixels = read_image(save(tmp_path / "red.png", red)).pixels
    assert (pixels[:2] == round(0.299 * 200)).all()
    assert (pixels[2:] == 0).all()


def test_transparent_pixels_are_black(tmp_path):
    alpha = np.full((12, 20), 255, np.uint8)
    alpha[:, 10:] = 0
    expected = np.where(alpha > 0, ramp(), 0)
    for name, bands in (("la.png", [ramp()]), ("rgba.png", [ramp()] * 3), ("rgba.tif", [ramp()] * 3)):
        assert np.array_equal(read_image(save(tmp_path / name, np.dstack([*bands, alpha]))).pixels, expected)
    keyed = save(tmp_path / "keyed.png", ramp(), transparency=255)
    assert np.array_equal(read_image(keyed).pixels, np.where(ramp() == 255, 0, ramp()))


def test_transparent_gray_of_sixteen_bits_is_black_and_does_not_set_the_range(tmp_path):
    deep = ramp(top=30000, dtype=np.uint16) + 1000
    deep[:, :6] = 65535
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    path = write_png(tmp_path / "a.png", 20, 12, 16, 0, rows, png_chunk(b"tRNS", b"\xff\xff"))
    image = read_image(path)
    assert np.array_equal(image.pixels, np.where(deep == 65535, 0, deep))
    assert np.array_equal(image.padding, deep == 65535)
    loaded = load_images([path], deep.shape, intensity="minmax").pixels[0, 0].numpy()
    assert (loaded[:, :6] == 0).all()
    assert (loaded[:, 6:].min(), loaded[:, 6:].max()) == (0, 65535)


@pytest.mark.parametrize(("bits", "key"), [(1, 1), (2, 3), (4, 15)])
def test_transparent_gray_below_eight_bits_is_black(tmp_path, bits, key):
    # Each row has every value; the file counts the transparent one in its own bits, Pillow in eight.
    top = 2**bits - 1
    values = np.arange(8) % (top + 1)
    row = np.packbits(np.unpackbits(values.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :].ravel()).tobytes()
    chunk = png_chunk(b"tRNS", struct.pack(">H", key))
    path = write_png(tmp_path / "a.png", 8, 2, bits, 0, (b"\0" + row) * 2, chunk)
    expected = np.where(values == key, 0, values * (255 // top))
    if bits == 1:
        refused(path, "no contrast")  # nothing is left of two values
    else:
        assert np.array_equal(read_image(path).pixels, [expected] * 2)


@pytest.mark.parametrize("top", [0, 1])
def test_constant_image_is_refused(tmp_path, top):
    flat = np.full((8, 8), top, np.uint8)
    for name in ("a.png", "a.tif", "a.bmp", "a.jpg"):
        refused(save(tmp_path / name, flat), f"no contrast: every pixel is {top}")
    refused(save(tmp_path / "deep.png", flat.astype(np.uint16)), "no contrast")
    refused(save(tmp_path / "float.tif", flat.astype(np.float32)), "no contrast")


def test_ranges_beyond_float32_are_refused(tmp_path):
    wide = np.where(ramp() > 100, 3e38, -3e38).astype(np.float32)
    refused(write_tiff(tmp_path / "wide.tif", wide, sample_format=3), "does not fit float32")
    infinite = ramp().astype(np.float32)
    infinite[3, 4] = np.inf
    refused(write_tiff(tmp_path / "infinite.tif", infinite, sample_format=3), "NaN or infinite")


def test_provenance_has_plain_terms_and_numbers(tmp_path):
    image = read_image(save(tmp_path / "a.png", ramp(top=65535, dtype=np.uint16)))
    assert image.provenance == {"bits_stored": 16, "mode": "I;16", "photometric_interpretation": "grayscale"}
    assert not image.for_processing
    image = read_image(write_tiff(tmp_path / "a.tif", ramp(), photometric=0))
    assert image.provenance["photometric_interpretation"] == "WhiteIsZero"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.bmp", "a.dcm"])
def test_open_file_and_bytes_in_memory_are_read_like_a_path(tmp_path, name):
    path = tmp_path / name
    if name == "a.dcm":
        write_dicom(path, ramp())
    else:
        save(path, ramp())
    expected = read_image(path).pixels
    with open(path, "rb") as file:
        assert np.array_equal(read_image(file).pixels, expected)
        assert not file.closed
    assert np.array_equal(read_image(io.BytesIO(path.read_bytes())).pixels, expected)


def test_orientation_of_xmp_and_raw_profile_is_applied(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    xmp = PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="3"/>')
    assert np.array_equal(read_image(save(tmp_path / "x.png", ramp(), pnginfo=xmp)).pixels, ramp()[::-1, ::-1])
    exif = Image.Exif()
    exif[274] = 6
    profile = PngInfo()
    profile.add_text("Raw profile type exif", f"\nexif\n{len(exif.tobytes())}\n{exif.tobytes().hex()}\n")
    assert read_image(save(tmp_path / "p.png", ramp(), pnginfo=profile)).pixels.shape == (20, 12)


def test_cmyk_becomes_gray(tmp_path):
    image = Image.fromarray(np.dstack([255 - ramp()] * 3)).convert("CMYK")
    for name in ("a.tif", "a.jpg"):
        read = read_image(save(tmp_path / name, image)).pixels.astype(int)
        assert np.abs(read - (255 - ramp().astype(int))).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    # Stored is the inverse of the rotation that the orientation asks for.
    upright = ramp()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    for name, top, dtype in (("a.png", 255, np.uint8), ("b.png", 65535, np.uint16)):
        scaled = np.ascontiguousarray((stored.astype(np.float64) * top / 255).astype(dtype))
        read = read_image(save(tmp_path / name, scaled, exif=exif)).pixels
        assert np.array_equal(read, (upright.astype(np.float64) * top / 255).astype(dtype))
    jpeg = read_image(save(tmp_path / "a.jpg", np.ascontiguousarray(stored), exif=exif, quality=100)).pixels
    assert np.abs(jpeg.astype(int) - upright).max() <= 3
    tiff = read_image(write_tiff(tmp_path / "a.tif", np.ascontiguousarray(stored), orientation=orientation)).pixels
    assert np.array_equal(tiff, upright)


def test_damaged_exif_is_ignored(tmp_path):
    path = save(tmp_path / "a.png", ramp(), exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    assert np.array_equal(read_image(path).pixels, ramp())


def test_several_pages_are_refused(tmp_path):
    pages = [Image.fromarray(ramp()), Image.fromarray(255 - ramp())]
    refused(save(tmp_path / "a.tif", pages[0], save_all=True, append_images=pages[1:]), "TIFF file holds 2 images")
    refused(save(tmp_path / "a.png", pages[0], save_all=True, append_images=pages[1:]), "PNG file holds 2 images")


@pytest.mark.parametrize(("color", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_color_is_refused_rather_than_truncated_to_eight(tmp_path, color, channels):
    path = write_png(tmp_path / "a.png", 4, 4, 16, color, (b"\0" + b"\x12\x34" * 4 * channels) * 4)
    refused(path, "16 bits a channel")


def test_lab_is_refused(tmp_path):
    rgb = Image.fromarray(np.dstack([ramp()] * 3))
    convert = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    refused(save(tmp_path / "a.tif", ImageCms.applyTransform(rgb, convert)), "LAB color")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.bmp", "deep.png", "deep.tif"])
def test_truncated_file_is_refused_at_every_length(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40)).astype(np.uint8)
    path = save(tmp_path / name, noise.astype(np.uint16) * 257 if name.startswith("deep") else noise)
    data = path.read_bytes()
    assert read_image(path).pixels.shape == (40, 40)
    refused_lengths = 0
    for length in range(0, int(len(data) * 0.9), max(1, len(data) // 40)):
        path.write_bytes(data[:length])
        with pytest.raises(ReadError) as caught:
            read_image(path)
        assert_sentence(str(caught.value))
        refused_lengths += 1
    assert refused_lengths > 30


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.bmp", "a.dcm"])
def test_damaged_bytes_give_an_image_or_a_sentence(tmp_path, name):
    path = tmp_path / name
    if name == "a.dcm":
        write_dicom(path, ramp(40, 40, 4095, np.uint16), BitsStored=12, HighBit=11, WindowCenter=2000, WindowWidth=900)
    else:
        save(path, np.random.default_rng(0).integers(0, 256, (40, 40)).astype(np.uint8))
    data = np.frombuffer(path.read_bytes(), np.uint8)
    generator = np.random.default_rng(1)
    outcomes = set()
    for _ in range(150):
        damaged = data.copy()
        # Mostly headers: damage among the pixels often gives another valid image.
        positions = generator.integers(0, min(len(data), 700), generator.integers(1, 6))
        damaged[positions] = generator.integers(0, 256, len(positions))
        path.write_bytes(damaged.tobytes())
        try:
            image = read_image(path, max_pixels=1_000_000)
            assert image.pixels.ndim == 2
            assert np.isfinite(image.pixels).all()
            outcomes.add("image")
        except ReadError as error:
            assert_sentence(str(error))
            outcomes.add("refused")
    # Check sums cover all of a PNG.
    assert outcomes == ({"refused"} if name == "a.png" else {"image", "refused"})


def test_pixel_limit_is_checked_before_decoding(tmp_path):
    # A header of 400 million pixels over no data: decoding it would fail otherwise.
    refused(write_png(tmp_path / "bomb.png", 20000, 20000, 8, 0, b""), "20000 x 20000 pixels|more pixels")
    refused(write_png(tmp_path / "cap.png", 12000, 12000, 8, 0, b""), "12000 x 12000 pixels, more than the 100 million")
    refused(write_tiff(tmp_path / "a.tif", ramp(30, 40)), "40 x 30 pixels, more than", max_pixels=1199)
    assert read_image(tmp_path / "a.tif", max_pixels=1200).pixels.shape == (30, 40)
    assert MAX_PIXELS <= Image.MAX_IMAGE_PIXELS * 2, "Pillow would speak before the package"


def test_file_that_is_not_an_image_is_refused_with_its_kind(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    refused(tmp_path / "empty.png", "the file is empty")
    (tmp_path / "text.jpeg").write_text("BMI of the patients")
    refused(tmp_path / "text.jpeg", "not a PNG, JPEG, TIFF, BMP or DICOM image")
    Image.fromarray(ramp()).save(tmp_path / "a.png", format="GIF")
    refused(tmp_path / "a.png", "but GIF")
    Image.fromarray(ramp()).save(tmp_path / "b.png", format="WEBP")
    refused(tmp_path / "b.png", "but WebP")
    refused(tmp_path / "absent.png", "No such file")
    refused(tmp_path, "folder")
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "not a regular file")


def test_warnings_of_a_reader_are_hidden_and_no_others(tmp_path, recwarn):
    warnings.simplefilter("always")
    # Pillow warns about a TIFF whose directory is cut off, and about sizes beyond its own first limit.
    path = write_tiff(tmp_path / "a.tif", ramp())
    path.write_bytes(path.read_bytes()[:-60])
    big = write_png(tmp_path / "big.png", 10000, 9500, 1, 0, b"")
    for file in (path, big):
        with contextlib.suppress(ReadError):
            read_image(file)
    assert len(recwarn) == 0
    for file in (path, big):
        with contextlib.suppress(OSError), Image.open(file):
            pass
    assert len(recwarn) >= 2
    recwarn.clear()
    warnings.warn("mine", UserWarning, stacklevel=1)
    thread = threading.Thread(target=lambda: warnings.warn("another thread's", UserWarning, stacklevel=1))
    thread.start()
    thread.join()
    assert [str(warning.message) for warning in recwarn] == ["mine", "another thread's"]

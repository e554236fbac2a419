"""DICOM: the display pipeline against the standard's formulas, refusals, and pydicom's own odd files."""

import importlib
import io
import logging
import os
import pathlib
import subprocess
import sys

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from sample_files import dicom, look_up_table, ramp, save, write_dicom

import simsid.data.dicom
from simsid.data import Record, load_images, read_image
from simsid.errors import ReadError

PACKAGED = pathlib.Path(pydicom.__file__).parent / "data"
DEEP = ramp(16, 24, 4095, np.uint16)
TWELVE = {"BitsStored": 12, "HighBit": 11}


def refused(path, match, **options):
    with pytest.raises(ReadError, match=match) as caught:
        read_image(path, **options)
    reason = str(caught.value)
    assert "\n" not in reason
    assert "Secret" not in reason
    assert "hidden-id" not in reason


def test_stored_values_without_a_window_declare_their_bits(tmp_path):
    image = read_image(write_dicom(tmp_path / "a.dcm", DEEP, **TWELVE))
    assert (image.format, image.bits, image.declared, image.for_display) == ("DICOM", 12, (0.0, 4095.0), False)
    assert np.array_equal(image.pixels, DEEP)
    image = read_image(write_dicom(tmp_path / "b.dcm", ramp()))
    assert (image.bits, image.declared, image.for_display) == (8, (0.0, 255.0), True)


def test_rescale_then_window_then_inversion_in_that_order(tmp_path):
    elements = {"RescaleSlope": "2", "RescaleIntercept": "-1000", "WindowCenter": "1500", "WindowWidth": "2001"}
    path = write_dicom(tmp_path / "a.dcm", DEEP, **TWELVE, **elements)
    expected = np.clip((DEEP * 2.0 - 1000 - 1499.5) / 2000 + 0.5, 0, 1)
    assert 0.1 < expected.mean() < 0.9
    image = read_image(path)
    assert (image.declared, image.for_display) == ((0.0, 1.0), True)
    assert np.allclose(image.pixels, expected, atol=1e-6)
    inverted = write_dicom(tmp_path / "b.dcm", DEEP, PhotometricInterpretation="MONOCHROME1", **TWELVE, **elements)
    assert np.allclose(read_image(inverted).pixels, 1 - expected, atol=1e-6)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("center", "width"), [(2048, 1024), (100, 1), (3000.5, 17.25)])
def test_window_functions_agree_with_pydicom(tmp_path, function, center, width):
    elements = {"WindowCenter": [center, 1], "WindowWidth": [width, 2], "VOILUTFunction": function}
    path = write_dicom(tmp_path / "a.dcm", DEEP, **TWELVE, **elements)
    dataset = pydicom.dcmread(path)
    expected = apply_voi_lut(dataset.pixel_array, dataset) / 4095
    assert np.allclose(read_image(path).pixels, expected, atol=1e-6)


@pytest.mark.parametrize(("center", "width"), [(2048, 0), (2048, -5), ("", ""), (None, 100)])
def test_an_unusable_window_counts_as_none(tmp_path, center, width):
    dataset = dicom(DEEP, **TWELVE)
    if center is not None:
        dataset.WindowCenter = center
    dataset.WindowWidth = width
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    image = read_image(tmp_path / "a.dcm")
    assert not image.for_display
    assert np.array_equal(image.pixels, DEEP)


def test_voi_lut_wins_over_the_window_and_maps_to_its_own_range(tmp_path):
    table = np.linspace(0, 1, 3000) ** 2 * 1023
    sequence = look_up_table(np.rint(table), 500, 10)
    path = write_dicom(tmp_path / "a.dcm", DEEP, **TWELVE, VOILUTSequence=sequence, WindowCenter=1, WindowWidth=2)
    image = read_image(path)
    expected = np.rint(table)[np.clip(DEEP.astype(int) - 500, 0, 2999)]
    assert (image.declared, image.for_display) == ((0.0, 1023.0), True)
    assert np.array_equal(image.pixels, expected)
    dataset = pydicom.dcmread(path)
    assert np.array_equal(apply_voi_lut(dataset.pixel_array, dataset), expected)


def test_modality_lut_precedes_the_window(tmp_path):
    table = np.arange(4096)[::-1] // 16
    sequence = look_up_table(table, 0, 8)
    path = write_dicom(tmp_path / "a.dcm", DEEP, **TWELVE, ModalityLUTSequence=sequence)
    image = read_image(path)
    assert image.declared == (0.0, 255.0)
    assert np.array_equal(image.pixels, table[DEEP])
    dataset = pydicom.dcmread(path)
    assert np.array_equal(apply_modality_lut(dataset.pixel_array, dataset), table[DEEP])
    path = write_dicom(
        tmp_path / "b.dcm", DEEP, **TWELVE, ModalityLUTSequence=sequence, WindowCenter=128, WindowWidth=65
    )
    assert np.allclose(read_image(path).pixels, np.clip((table[DEEP] - 127.5) / 64 + 0.5, 0, 1), atol=1e-6)


def test_signed_values_and_a_negative_first_entry(tmp_path):
    signed = DEEP.astype(np.int16) - 2048
    image = read_image(write_dicom(tmp_path / "a.dcm", signed, **TWELVE))
    assert image.declared == (-2048.0, 2047.0)
    assert np.array_equal(image.pixels, signed)
    sequence = look_up_table(np.arange(4096), -2048, 12)
    image = read_image(write_dicom(tmp_path / "b.dcm", signed, **TWELVE, VOILUTSequence=sequence))
    assert np.array_equal(image.pixels, DEEP)


def test_packed_tables_of_bytes_and_words(tmp_path):
    table = (np.arange(256)[::-1]).astype(np.uint8)
    for name, entries in (("bytes", table.tobytes()), ("words", table.astype("<u2").tobytes())):
        sequence = look_up_table(table, 0, 8)
        sequence[0].add_new("LUTData", "OW", entries)
        path = write_dicom(tmp_path / name, ramp(), VOILUTSequence=sequence)
        assert np.array_equal(read_image(path).pixels, 255 - ramp())


def test_a_short_table_is_refused(tmp_path):
    sequence = look_up_table(np.arange(256), 0, 8)
    sequence[0].LUTDescriptor = [300, 0, 8]
    refused(write_dicom(tmp_path / "a", ramp(), VOILUTSequence=sequence), "256 of the 300 entries")


def test_bits_beyond_those_stored_are_not_pixels(tmp_path):
    # Old files keep an overlay in the unused high bits.
    path = write_dicom(tmp_path / "a.dcm", DEEP | np.uint16(0x8000), **TWELVE)
    assert np.array_equal(read_image(path).pixels, DEEP)


def test_padding_is_black_and_has_no_say_in_the_range(tmp_path):
    pixels = DEEP // 4 + 1000
    pixels[:, :6] = 4095
    inverted = {"PhotometricInterpretation": "MONOCHROME1"}
    for name, more in (("a", {}), ("b", inverted)):
        path = write_dicom(tmp_path / name, pixels, PixelPaddingValue=4095, **TWELVE, **more)
        image = read_image(path)
        assert np.array_equal(image.padding, pixels == 4095)
        loaded = load_images([path], pixels.shape, intensity="minmax").pixels[0, 0].numpy()
        assert (loaded[:, :6] == 0).all()
        assert loaded[:, 6:].min() == 0
        assert loaded[:, 6:].max() == 65535
    assert read_image(write_dicom(tmp_path / "c", pixels, PixelPaddingValue=5, **TWELVE)).padding is None


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_other_native_encodings(tmp_path, syntax):
    dataset = dicom(DEEP, **TWELVE)
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = DEEP.astype(">u2").tobytes()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(tmp_path / "a", enforce_file_format=True)
    assert np.array_equal(read_image(tmp_path / "a").pixels, DEEP)


@pytest.mark.parametrize(("implicit", "little"), [(True, True), (False, True), (False, False)])
def test_files_without_preamble_and_meta_information(tmp_path, implicit, little):
    dataset = dicom(DEEP, **TWELVE)
    if not little:
        dataset.PixelData = DEEP.astype(">u2").tobytes()
    del dataset.file_meta
    dataset.save_as(tmp_path / "a.ima", implicit_vr=implicit, little_endian=little)
    assert (tmp_path / "a.ima").read_bytes()[128:132] != b"DICM"
    assert np.array_equal(read_image(tmp_path / "a.ima").pixels, DEEP)


def compressed(path, syntax, pixels):
    dataset = dicom(pixels, **TWELVE)
    dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize(
    ("syntax", "module"), [(RLELossless, "pydicom"), (JPEG2000Lossless, "openjpeg"), (JPEGLSLossless, "jpeg_ls")]
)
def test_lossless_compression(tmp_path, syntax, module):
    pytest.importorskip(module, reason=f"needs the decoder {module} of the extra 'dicom'")
    large = ramp(70, 80, 4095, np.uint16)
    assert np.array_equal(read_image(compressed(tmp_path / "a", syntax, large)).pixels, large)


def test_baseline_jpeg(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(ramp()).save(buffer, "JPEG", quality=95)
    path = jpeg_dicom(tmp_path / "a", ramp(), buffer.getvalue(), JPEGBaseline8Bit)
    assert np.abs(read_image(path).pixels - ramp()).max() <= 3


def jpeg_dicom(path, pixels, data, syntax, **elements):
    dataset = dicom(pixels, **elements)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([data + b"\0" * (len(data) % 2)])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEG2000Lossless, JPEGLSLossless])
def test_compressed_data_of_another_size_is_refused_before_decoding(tmp_path, monkeypatch, syntax):
    if syntax == JPEGBaseline8Bit:
        data = save(tmp_path / "a.jpg", ramp(70, 80)).read_bytes()
    else:
        pytest.importorskip({JPEG2000Lossless: "openjpeg", JPEGLSLossless: "jpeg_ls"}[syntax])
        dataset = dicom(ramp(70, 80))
        dataset.compress(syntax)
        data = pydicom.encaps.get_frame(dataset.PixelData, 0, number_of_frames=1)
    monkeypatch.setattr(simsid.data.dicom, "pixel_array", None)
    path = jpeg_dicom(tmp_path / "a", ramp(70, 80), data, syntax, Columns=81)
    refused(path, "says 80 x 70 pixels, the header 81 x 70")


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, JPEGLosslessSV1])
def test_a_missing_decoder_names_the_extra(tmp_path, monkeypatch, syntax):
    path = jpeg_dicom(tmp_path / "a", ramp(), b"\0" * 100, syntax)
    monkeypatch.setattr(simsid.data.dicom, "get_decoder", lambda _: type("None", (), {"is_available": False}))
    refused(path, r"pip install 'simsid\[dicom\]'")


def test_lossless_jpeg_is_read_exactly(tmp_path):
    gdcm = pytest.importorskip("gdcm")
    plain = write_dicom(tmp_path / "plain", DEEP)
    reader = gdcm.ImageReader()
    reader.SetFileName(str(plain))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(tmp_path / "lossless"))
    assert writer.Write()
    assert pydicom.dcmread(tmp_path / "lossless").file_meta.TransferSyntaxUID == JPEGLosslessSV1
    np.testing.assert_array_equal(read_image(tmp_path / "lossless").pixels, read_image(plain).pixels)


def test_colour_multi_frame_and_other_objects_name_the_tag(tmp_path):
    refused(write_dicom(tmp_path / "a", DEEP, SamplesPerPixel=3), r"colour: Samples per Pixel \(0028,0002\) is 3")
    refused(
        write_dicom(tmp_path / "b", DEEP, PhotometricInterpretation="PALETTE COLOR"),
        r"\(0028,0004\) is PALETTE COLOR",
    )
    refused(write_dicom(tmp_path / "c", DEEP, PhotometricInterpretation=None), r"\(0028,0004\) is missing")
    refused(write_dicom(tmp_path / "d", DEEP, NumberOfFrames=7), r"multi-frame: Number of Frames \(0028,0008\) is 7")
    refused(write_dicom(tmp_path / "e", DEEP, PixelData=None), r"no Pixel Data \(7FE0,0010\)")
    report = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11", "Rows": None, "PixelData": None}
    refused(write_dicom(tmp_path / "f", DEEP, **report), r"Basic Text SR.*Rows \(0028,0010\)")
    refused(write_dicom(tmp_path / "g", DEEP, PixelData=DEEP.tobytes()[:-40]), "fewer|less than expected")
    refused(
        write_dicom(tmp_path / "h", DEEP, RescaleSlope="0", RescaleIntercept="0"), r"Rescale Slope \(0028,1053\) is 0"
    )
    refused(write_dicom(tmp_path / "i", DEEP, WindowCenter=1, WindowWidth=2, VOILUTFunction="CUBIC"), r"\(0028,1056\)")
    assert read_image(write_dicom(tmp_path / "j", DEEP, NumberOfFrames=1)).pixels.shape == DEEP.shape


def test_the_pixel_cap_comes_before_the_pixel_data(tmp_path, monkeypatch):
    path = write_dicom(tmp_path / "a", DEEP, Rows=40000, Columns=50000)
    parsed = []
    original = pydicom.dcmread

    def spy(*arguments, **options):
        parsed.append(options.get("stop_before_pixels"))
        return original(*arguments, **options)

    monkeypatch.setattr(pydicom, "dcmread", spy)
    refused(path, "50000 x 40000 pixels, more than the 100 million")
    assert parsed == [True]
    refused(write_dicom(tmp_path / "b", DEEP), "24 x 16 pixels, more than", max_pixels=383)


def test_a_deflated_bomb_is_refused_before_it_is_inflated(tmp_path):
    dataset = dicom(DEEP, **TWELVE)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.add_new((0x0029, 0x0010), "LO", "padding")
    dataset.add_new((0x0029, 0x1000), "OB", b"\0" * 70_000_000)
    dataset.save_as(tmp_path / "a", enforce_file_format=True)
    assert (tmp_path / "a").stat().st_size < 200_000
    refused(tmp_path / "a", "deflated DICOM data set is larger", max_pixels=1000)


def packaged_files():
    return sorted(
        path
        for path in PACKAGED.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and "__pycache__" not in path.parts
    )


def outcome(path):
    """The image, or the sentence why there is none."""
    try:
        return read_image(path), None
    except ReadError as error:
        return None, str(error)


def test_every_file_that_pydicom_ships_gives_an_image_or_one_sentence(capfd, recwarn, caplog):
    caplog.set_level(logging.DEBUG)
    images, reasons = {}, {}
    for path in packaged_files():
        image, reason = outcome(path)
        if reason is None:
            images[path.name] = image
        else:
            reasons[path.name] = reason
    for name, image in images.items():
        assert image.pixels.ndim == 2, name
        assert image.pixels.size, name
        assert np.isfinite(image.pixels).all(), name
        assert image.pixels.dtype in (np.uint8, np.uint16, np.float32), name
    for name, reason in reasons.items():
        assert reason, name
        assert "\n" not in reason, name
        assert len(reason) < 400, name
    assert len(images) > 40
    assert len(reasons) > 60
    assert len(recwarn) == 0
    assert not [record for record in caplog.records if record.name.startswith("pydicom")]
    assert capfd.readouterr() == ("", "")

    assert images["CT_small.dcm"].pixels.shape == (128, 128)
    # Stored 175 with slope 1 and intercept -1024 (the file's header says so).
    assert images["CT_small.dcm"].pixels[0, 0] == 175 - 1024
    assert images["MR_small.dcm"].pixels.shape == (64, 64)
    for other in ("bigendian", "implicit", "RLE", "expb", "padded"):
        assert np.array_equal(images["MR_small.dcm"].pixels, images[f"MR_small_{other}.dcm"].pixels), other
    assert images["image_dfl.dcm"].pixels.shape == (512, 512)
    assert "Samples per Pixel (0028,0002) is 3" in reasons["SC_rgb_rle.dcm"]
    assert "Number of Frames (0028,0008) is 15" in reasons["rtdose.dcm"]
    assert "PALETTE COLOR" in reasons["examples_palette.dcm"]
    assert "RT Plan Storage" in reasons["rtplan.dcm"]
    assert "less than expected" in reasons["MR_truncated.dcm"]
    assert "NumberOfFrames (0028,0008)" in reasons["badVR.dcm"]
    assert "gzip" in reasons["zipMR.gz"]


@pytest.mark.parametrize("name", ["MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm"])
def test_decoders_of_the_extra_give_what_the_native_file_holds(name):
    module = "openjpeg" if "jp2k" in name else "jpeg_ls"
    pytest.importorskip(module, reason=f"needs the decoder {module} of the extra 'dicom'")
    folder = PACKAGED / "test_files"
    assert np.array_equal(read_image(folder / name).pixels, read_image(folder / "MR_small.dcm").pixels)


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "examples_overlay.dcm", "693_J2KI.dcm"])
def test_known_files_agree_with_pydicoms_own_pipeline(name):
    if name == "693_J2KI.dcm":
        pytest.importorskip("openjpeg", reason="needs the decoder openjpeg of the extra 'dicom'")
    path = PACKAGED / "test_files" / name
    dataset = pydicom.dcmread(path)
    expected = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset).astype(np.float64)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        expected = -expected
    image = read_image(path)

    def spread(values):
        return (values.astype(np.float64) - values.min()) / (float(values.max()) - values.min())

    # pydicom maps a window to the stored range, this reader to 0..1: equal up to that linear map.
    assert np.allclose(spread(image.pixels), spread(expected), atol=1e-5)


def test_reading_in_many_threads_is_as_quiet(tmp_path, capfd, recwarn):
    files = [path for path in packaged_files() if path.suffix in (".dcm", "")]
    loaded = load_images([Record(str(path)) for path in files], 16, workers=8)
    assert len(loaded) + len(loaded.failures) == len(files)
    assert [failure.path for failure in loaded.failures] == [
        str(path) for path in files if str(path) not in set(loaded.paths)
    ]
    assert len(recwarn) == 0
    assert capfd.readouterr() == ("", "")


def test_patient_data_is_not_in_what_damaged_headers_say(tmp_path):
    dataset = dicom(DEEP, **TWELVE)
    dataset.save_as(tmp_path / "a", enforce_file_format=True)
    data = (tmp_path / "a").read_bytes()
    generator = np.random.default_rng(0)
    sentences = 0
    for _ in range(200):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[generator.integers(132, 600, 4)] = generator.integers(0, 256, 4)
        (tmp_path / "a").write_bytes(damaged.tobytes())
        try:
            read_image(tmp_path / "a")
        except ReadError as error:
            sentences += 1
            assert "Secret" not in str(error)
            assert "hidden-id" not in str(error)
    assert sentences > 20


def test_importing_the_package_imports_no_heavy_optional(tmp_path):
    code = (
        "import sys, simsid.data\n"
        "heavy = {'sklearn', 'pydicom', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert importlib.import_module("simsid.data").Record is Record


def test_float_pixel_data_is_read(tmp_path):
    values = DEEP.astype(np.float32) / 7
    dataset = dicom(DEEP)
    del dataset.PixelData
    del dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation
    dataset.BitsAllocated = 32
    dataset.FloatPixelData = values.tobytes()
    dataset.save_as(tmp_path / "a", enforce_file_format=True)
    image = read_image(tmp_path / "a")
    assert (image.declared, image.bits) == (None, 32)
    assert np.allclose(image.pixels, values)

"""DICOM files of every encoding are read or refused by tag; pydicom's own odd files give an image or one sentence."""

import importlib
import io
import logging
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from sample_files import compressed_dicom, dicom, gdcm_dicom, jpeg_dicom, ramp, refused, save, write_dicom

import simsid.data.dicom_pixels
from simsid.data import Record, gdcm_child, load_images, read_image
from simsid.errors import ReadError

PACKAGED = pathlib.Path(pydicom.__file__).parent / "data"
DEEP = ramp(16, 24, 4095, np.uint16)
TWELVE = {"BitsStored": 12, "HighBit": 11}


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_native_encodings_give_the_same_pixels(tmp_path, syntax):
    dataset = dicom(DEEP, **TWELVE)
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = DEEP.astype(">u2").tobytes()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(tmp_path / "a", enforce_file_format=True)
    assert np.array_equal(read_image(tmp_path / "a").pixels, DEEP)


@pytest.mark.parametrize(("implicit", "little"), [(True, True), (False, True), (False, False)])
def test_file_without_preamble_and_meta_information_is_read(tmp_path, implicit, little):
    dataset = dicom(DEEP, **TWELVE)
    if not little:
        dataset.PixelData = DEEP.astype(">u2").tobytes()
    del dataset.file_meta
    dataset.save_as(tmp_path / "a.ima", implicit_vr=implicit, little_endian=little)
    assert (tmp_path / "a.ima").read_bytes()[128:132] != b"DICM"
    assert np.array_equal(read_image(tmp_path / "a.ima").pixels, DEEP)


@pytest.mark.parametrize(
    ("syntax", "module"), [(RLELossless, "pydicom"), (JPEG2000Lossless, "openjpeg"), (JPEGLSLossless, "jpeg_ls")]
)
def test_lossless_compression_is_read_exactly(tmp_path, syntax, module):
    pytest.importorskip(module, reason=f"needs the decoder {module} of the extra 'dicom'")
    large = ramp(70, 80, 4095, np.uint16)
    assert np.array_equal(read_image(compressed_dicom(tmp_path / "a", syntax, large, **TWELVE)).pixels, large)


def test_baseline_jpeg_is_read(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(ramp()).save(buffer, "JPEG", quality=95)
    path = jpeg_dicom(tmp_path / "a", ramp(), buffer.getvalue(), JPEGBaseline8Bit)
    assert np.abs(read_image(path).pixels - ramp()).max() <= 3


def test_color_multi_frame_and_other_objects_are_refused_by_tag(tmp_path):
    refused(write_dicom(tmp_path / "a", DEEP, SamplesPerPixel=3), r"color: Samples per Pixel \(0028,0002\) is 3")
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


def packaged_files():
    return sorted(
        path
        for path in PACKAGED.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and "__pycache__" not in path.parts
    )


def outcome(path):
    """Return the image and `None`, or `None` and the reason."""
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
    # Nothing of these two lies within their default window.
    assert "no contrast: every pixel is 1 after its VOI LUT or window" in reasons["17166"]
    assert "no contrast" in reasons["17196"]
    assert images["JPGExtended.dcm"].bits == images["JPEG-lossy.dcm"].bits == 12
    assert "Number of Frames (0028,0008)" in reasons["badVR.dcm"]
    assert "gzip" in reasons["zipMR.gz"]


@pytest.mark.parametrize("name", ["MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm"])
def test_compressed_known_file_equals_its_native_version(name):
    module = "openjpeg" if "jp2k" in name else "jpeg_ls"
    pytest.importorskip(module, reason=f"needs the decoder {module} of the extra 'dicom'")
    folder = PACKAGED / "test_files"
    assert np.array_equal(read_image(folder / name).pixels, read_image(folder / "MR_small.dcm").pixels)


def test_reading_in_many_threads_prints_and_warns_nothing(tmp_path, capfd, recwarn):
    files = [path for path in packaged_files() if path.suffix in (".dcm", "")]
    loaded = load_images([Record(str(path)) for path in files], 16, workers=8)
    assert len(loaded) + len(loaded.failures) == len(files)
    assert [failure.path for failure in loaded.failures] == [
        str(path) for path in files if str(path) not in set(loaded.paths)
    ]
    assert len(recwarn) == 0
    assert capfd.readouterr() == ("", "")


def test_errors_of_damaged_headers_quote_no_patient(tmp_path):
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


def test_importing_the_package_imports_no_heavy_library(tmp_path):
    code = (
        "import sys, simsid.data\n"
        "heavy = {'sklearn', 'pydicom', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert importlib.import_module("simsid.data").Record is Record


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEG2000Lossless, JPEGLSLossless])
def test_compressed_data_that_does_not_fit_the_header_is_refused_before_decoding(tmp_path, monkeypatch, syntax):
    def encoded(pixels):
        if syntax == JPEGBaseline8Bit:
            return save(tmp_path / "a.jpg", pixels).read_bytes()
        pytest.importorskip({JPEG2000Lossless: "openjpeg", JPEGLSLossless: "jpeg_ls"}[syntax])
        dataset = dicom(pixels)
        if pixels.ndim == 3:
            dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
        dataset.compress(syntax)
        return pydicom.encaps.get_frame(dataset.PixelData, 0, number_of_frames=1)

    monkeypatch.setattr(simsid.data.dicom_pixels, "_with_pydicom", None)
    gray, color = ramp(70, 80), np.dstack([ramp(70, 80)] * 3)
    path = jpeg_dicom(tmp_path / "a", gray, encoded(gray), syntax, Columns=81)
    refused(path, "says 80 x 70 pixels, the header 81 x 70")
    refused(jpeg_dicom(tmp_path / "b", gray, encoded(color), syntax), "in color: it has 3 components")
    if syntax != JPEGBaseline8Bit:
        path = jpeg_dicom(tmp_path / "c", gray, encoded(ramp(70, 80, 65535, np.uint16)), syntax)
        refused(path, r"has 16 bits, Bits Allocated \(0028,0100\) is 8")


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, JPEGLosslessSV1])
def test_missing_decoder_names_the_extra_to_install(tmp_path, monkeypatch, syntax):
    path = jpeg_dicom(tmp_path / "a", ramp(), b"\0" * 100, syntax)
    decoder = type("None", (), {"available_plugins": ()})
    monkeypatch.setattr(simsid.data.dicom_pixels, "get_decoder", lambda _: decoder)
    monkeypatch.setattr(simsid.data.dicom_pixels.importlib.util, "find_spec", lambda _: None)
    refused(path, r"pip install 'simsid\[dicom\]'")


@pytest.mark.parametrize(
    ("syntax", "difference"),
    [("JPEGLosslessProcess14", 0), ("JPEGLosslessProcess14_1", 0), ("JPEGExtendedProcess2_4", 2)],
)
@pytest.mark.parametrize("signed", [False, True])
def test_jpeg_of_up_to_sixteen_bits_is_read_in_a_child_process(tmp_path, syntax, difference, signed):
    pytest.importorskip("gdcm", reason="needs the decoder gdcm of the extra 'dicom'")
    pixels = ramp(64, 96, 4095, np.uint16)
    elements = {}
    if signed and difference == 0:
        pixels, elements = (pixels.astype(np.int32) - 2048).astype(np.int16) & 0xFFF, {"PixelRepresentation": 1}
    path = gdcm_dicom(tmp_path / "a", pixels.astype(np.uint16), syntax, **TWELVE, **elements)
    expected = pixels.astype(int)
    expected = expected - 4096 * (expected > 2047) if elements else expected
    assert np.abs(read_image(path).pixels - expected).max() <= difference


def test_damaged_jpeg_in_the_child_is_a_sentence(tmp_path):
    pytest.importorskip("gdcm", reason="needs the decoder gdcm of the extra 'dicom'")
    path = gdcm_dicom(tmp_path / "a", ramp(64, 96, 4095, np.uint16), "JPEGLosslessProcess14_1", **TWELVE)
    frame = pydicom.encaps.get_frame(pydicom.dcmread(path).PixelData, 0, number_of_frames=1)
    pixels = np.zeros((64, 96), np.uint16)
    cut = jpeg_dicom(tmp_path / "b", pixels, frame[: len(frame) // 2], JPEGLosslessSV1, **TWELVE)
    refused(cut, "JPEG Lossless.*damaged or cut off")
    refused(
        jpeg_dicom(tmp_path / "c", pixels, b"\xff\xd8" + b"\1" * 99, JPEGLosslessSV1, **TWELVE), "damaged or cut off"
    )


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        pytest.param("import os; os.abort()", "died of signal 6", id="aborts"),
        pytest.param("import time; time.sleep(60)", "longer than 0.5 s", id="hangs"),
        pytest.param("raise RuntimeError", "damaged or cut off", id="raises"),
        pytest.param("print('few')", "another size", id="answers nonsense"),
    ],
)
def test_death_of_the_child_is_a_sentence(tmp_path, monkeypatch, code, reason):
    script = tmp_path / "child.py"
    script.write_text(code)
    monkeypatch.setattr(gdcm_child, "__file__", str(script))
    monkeypatch.setattr(simsid.data.dicom_pixels, "GDCM_SECONDS", 0.5 if "longer" in reason else 30)
    monkeypatch.setattr(simsid.data.dicom_pixels.importlib.util, "find_spec", lambda _: True)
    path = jpeg_dicom(tmp_path / "a", DEEP, b"\0" * 100, JPEGLosslessSV1, **TWELVE)
    start = time.monotonic()
    refused(path, f"JPEG Lossless.*{reason}")
    assert time.monotonic() - start < 20


def test_each_compression_has_one_decoder_and_gdcm_stays_out_of_this_process(tmp_path, monkeypatch):
    pytest.importorskip("gdcm", reason="needs the decoder gdcm of the extra 'dicom'")
    for syntax in (JPEG2000Lossless, JPEGLSLossless, JPEGExtended12Bit, JPEGBaseline8Bit, RLELossless):
        path = jpeg_dicom(tmp_path / "a", ramp(), b"\xff\xd8" + b"\0" * 100, syntax)
        with pytest.raises(ReadError) as caught:
            read_image(path)
        assert "gdcm:" not in str(caught.value), "pydicom asked GDCM too"


def test_only_needed_elements_are_read(tmp_path):
    # A sequence that cannot be parsed, in a tag that no image needs.
    dataset = dicom(DEEP, **TWELVE)
    dataset.add_new("ReferencedImageSequence", "OB", b"\xfe\xff\x00\xe0garbage!")
    dataset.add_new("PatientComments", "UT", "x" * 70000)
    dataset.save_as(tmp_path / "a", enforce_file_format=True)
    assert np.array_equal(read_image(tmp_path / "a").pixels, DEEP)

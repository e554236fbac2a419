"""The way from stored DICOM values to gray values, against the standard's formulas and real files' mistakes."""

import pathlib

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence
from pydicom.uid import JPEG2000Lossless, RLELossless
from sample_files import compressed_dicom, dicom, look_up_table, ramp, refused, write_dicom

from simsid.data import load_images, read_image

PACKAGED = pathlib.Path(pydicom.__file__).parent / "data"
DEEP = ramp(16, 24, 4095, np.uint16)
TWELVE = {"BitsStored": 12, "HighBit": 11}
INVERTED = {"PhotometricInterpretation": "MONOCHROME1"}


def test_image_without_window_declares_the_range_of_its_bits(tmp_path):
    image = read_image(write_dicom(tmp_path / "a.dcm", DEEP, **TWELVE))
    assert (image.format, image.bits, image.declared, image.for_display) == ("DICOM", 12, (0.0, 4095.0), False)
    assert np.array_equal(image.pixels, DEEP)
    image = read_image(write_dicom(tmp_path / "b.dcm", ramp()))
    assert (image.bits, image.declared, image.for_display) == (8, (0.0, 255.0), True)


def test_rescale_precedes_window_and_window_precedes_inversion(tmp_path):
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
def test_unusable_window_counts_as_none(tmp_path, center, width):
    dataset = dicom(DEEP, **TWELVE)
    if center is not None:
        dataset.WindowCenter = center
    dataset.WindowWidth = width
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    image = read_image(tmp_path / "a.dcm")
    assert not image.for_display
    assert np.array_equal(image.pixels, DEEP)


def test_voi_lut_takes_precedence_over_window_and_maps_to_its_own_range(tmp_path):
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


def test_signed_values_are_looked_up_from_a_negative_first_entry(tmp_path):
    signed = DEEP.astype(np.int16) - 2048
    image = read_image(write_dicom(tmp_path / "a.dcm", signed, **TWELVE))
    assert image.declared == (-2048.0, 2047.0)
    assert np.array_equal(image.pixels, signed)
    sequence = look_up_table(np.arange(4096), -2048, 12)
    image = read_image(write_dicom(tmp_path / "b.dcm", signed, **TWELVE, VOILUTSequence=sequence))
    assert np.array_equal(image.pixels, DEEP)


def test_table_is_read_from_packed_bytes_and_words(tmp_path):
    table = (np.arange(256)[::-1]).astype(np.uint8)
    for name, entries in (("bytes", table.tobytes()), ("words", table.astype("<u2").tobytes())):
        sequence = look_up_table(table, 0, 8)
        sequence[0].add_new("LUTData", "OW", entries)
        path = write_dicom(tmp_path / name, ramp(), VOILUTSequence=sequence)
        assert np.array_equal(read_image(path).pixels, 255 - ramp())


def test_table_shorter_than_its_descriptor_is_refused(tmp_path):
    sequence = look_up_table(np.arange(256), 0, 8)
    sequence[0].LUTDescriptor = [300, 0, 8]
    refused(write_dicom(tmp_path / "a", ramp(), VOILUTSequence=sequence), "256 of the 300 entries")


def test_overlay_bits_above_the_stored_ones_are_ignored(tmp_path):
    # Old files keep an overlay in the unused high bits.
    path = write_dicom(tmp_path / "a.dcm", DEEP | np.uint16(0x8000), **TWELVE)
    assert np.array_equal(read_image(path).pixels, DEEP)


def test_padding_is_black_and_does_not_set_the_range(tmp_path):
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


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "examples_overlay.dcm", "693_J2KI.dcm"])
def test_known_files_agree_with_the_pipeline_of_pydicom(name):
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


def test_float_pixel_data_keeps_its_values(tmp_path):
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


@pytest.mark.parametrize("kind", ["VOILUTSequence", "ModalityLUTSequence"])
@pytest.mark.parametrize(
    ("declared", "largest", "top"),
    [(16, 4095, 4095), (16, 4096, 8191), (12, 4095, 4095), (10, 1000, 1023), (16, 65535, 65535), (16, 200, 255),
     (8, 255, 255), (0, 4095, 4095), (255, 1023, 1023), (8, 4095, 4095), (9, 511, 511)],
)  # fmt: skip
@pytest.mark.parametrize("polarity", ["MONOCHROME2", "MONOCHROME1"])
def test_range_of_a_table_comes_from_its_largest_entry(tmp_path, kind, declared, largest, top, polarity):
    table = np.rint(np.linspace(0, largest, 4096)).astype(int)
    sequence = look_up_table(table, 0, declared)
    path = write_dicom(tmp_path / "a", DEEP, **TWELVE, **{kind: sequence}, PhotometricInterpretation=polarity)
    image = read_image(path)
    assert image.declared == (0.0, top)
    assert np.array_equal(image.pixels, top - table[DEEP] if polarity == "MONOCHROME1" else table[DEEP])
    loaded = load_images([path], DEEP.shape, intensity="range").pixels[0, 0].numpy() / 65535
    assert 0.3 < loaded.mean() < 0.7 or largest < 200 or largest == 4096


@pytest.mark.parametrize("polarity", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize(
    ("dtype", "elements", "vr", "value", "limit", "stored"),
    [
        pytest.param(np.int16, {}, "US", 63536, None, [-2000], id="US for -2000"),
        pytest.param(np.int16, {}, "US", 63536, 63636, [-2000, -1950, -1900], id="US range"),
        pytest.param(np.int16, {}, "US", 63536, 5, [-2000, 5], id="US range across zero"),
        pytest.param(np.uint16, {}, "SS", -1, None, [65535], id="SS for 65535"),
        pytest.param(np.uint16, {}, "SS", -100, -1, [65436, 65535], id="SS range"),
        pytest.param(np.int16, TWELVE, "US", 63536, None, [-2000], id="US for -2000 in 12 bits"),
        pytest.param(np.int16, TWELVE, "US", 2096, None, [-2000], id="12-bit pattern of -2000"),
        pytest.param(np.uint16, TWELVE, "US", 65535, None, [65535], id="fills the word of 12 bits"),
        pytest.param(np.uint16, TWELVE, "SS", -1, None, [65535], id="SS fills the word of 12 bits"),
        pytest.param(np.int16, TWELVE, "SS", -32768, None, [-32768], id="signed, fills the word of 12 bits"),
        pytest.param(np.uint8, {}, "US", 65535, None, [255], id="16 bits for 8"),
    ],
)
def test_padding_of_either_sign_is_black(tmp_path, polarity, dtype, elements, vr, value, limit, stored):
    pixels = (100 + ramp(16, 24, 100)).astype(dtype)
    pixels[:, :6] = np.resize(np.array(stored).astype(dtype), (16, 6))
    dataset = dicom(pixels, PhotometricInterpretation=polarity, **elements)
    for keyword, number in (("PixelPaddingValue", value), ("PixelPaddingRangeLimit", limit)):
        if number is not None:
            dataset.add_new(
                keyword, vr if number <= 65535 and (vr == "SS") == (number < 0 or vr == "SS") else "US", number
            )
    dataset.save_as(tmp_path / "a", enforce_file_format=True)
    image = read_image(tmp_path / "a")
    assert np.array_equal(image.padding, np.arange(24)[None] < np.full((16, 1), 6))
    loaded = load_images([tmp_path / "a"], pixels.shape, intensity="minmax").pixels[0, 0].numpy()
    assert (loaded[:, :6] == 0).all()
    assert (loaded[:, 6:].min(), loaded[:, 6:].max()) == (0, np.iinfo(loaded.dtype).max)


@pytest.mark.parametrize("high", [11, 13, 15])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", [None, RLELossless])
def test_sample_is_taken_from_below_its_high_bit(tmp_path, high, signed, syntax):
    # Every bit outside the sample is set: old files store overlays there.
    samples = DEEP.astype(np.int32) - 2048 * signed
    outside = 0xFFFF ^ (0xFFF << (high - 11))
    words = ((samples & 0xFFF) << (high - 11) | outside).astype(np.uint16)
    elements = {"BitsStored": 12, "HighBit": high, "PixelRepresentation": int(signed)}
    if syntax:
        path = compressed_dicom(tmp_path / "a", syntax, words, **elements)
    else:
        path = write_dicom(tmp_path / "a", words, **elements)
    image = read_image(path)
    assert np.array_equal(image.pixels, samples)
    assert image.declared == ((-2048.0, 2047.0) if signed else (0.0, 4095.0))


def test_bits_that_do_not_fit_their_word_are_refused_by_name(tmp_path):
    refused(write_dicom(tmp_path / "a", DEEP, BitsStored=12, HighBit=10), r"High Bit \(0028,0102\) is 10")
    refused(write_dicom(tmp_path / "b", DEEP, BitsStored=12, HighBit=16), r"High Bit \(0028,0102\) is 16")
    refused(write_dicom(tmp_path / "c", DEEP, BitsStored=17), r"Bits Stored \(0028,0101\) is 17")
    refused(write_dicom(tmp_path / "d", DEEP, BitsStored=0, HighBit=0), r"Bits Stored \(0028,0101\) is 0")


def test_high_bit_of_compressed_data_must_be_the_lowest_possible(tmp_path):
    pytest.importorskip("openjpeg", reason="needs the decoder openjpeg of the extra 'dicom'")
    path = compressed_dicom(tmp_path / "a", JPEG2000Lossless, ramp(70, 80, 4095, np.uint16), **TWELVE)
    dataset = pydicom.dcmread(path)
    dataset.HighBit = 15
    dataset.save_as(path)
    refused(path, r"High Bit \(0028,0102\) is 15 in compressed data of 12 bits")


def group(**elements):
    """A functional group, a macro by keyword with the elements of its one item."""
    item = Dataset()
    for macro, values in elements.items():
        setattr(item, macro, Sequence([Dataset()]))
        for keyword, value in values.items():
            setattr(getattr(item, macro)[0], keyword, value)
    return Sequence([item])


def test_values_of_functional_groups_precede_those_of_the_root(tmp_path):
    def rescale(slope):
        return {"PixelValueTransformationSequence": {"RescaleSlope": slope, "RescaleIntercept": 0}}

    def window(width):
        return {"FrameVOILUTSequence": {"WindowCenter": 2048, "WindowWidth": width}}

    root = {"RescaleSlope": 2, "RescaleIntercept": 0, "WindowCenter": 2048, "WindowWidth": 200}
    frame = {"PerFrameFunctionalGroupsSequence": group(**rescale(5), **window(500))}
    shared = {"SharedFunctionalGroupsSequence": group(**rescale(3), **window(300))}
    cases = [(root, 2, 200), ({**root, **shared}, 3, 300), ({**root, **shared, **frame}, 5, 500), (frame, 5, 500)]
    # Each value is looked for on its own: the window of the frame, the rescale of all.
    cases += [({**shared, "PerFrameFunctionalGroupsSequence": group(**window(500))}, 3, 500)]
    for i, (elements, slope, width) in enumerate(cases):
        image = read_image(write_dicom(tmp_path / str(i), DEEP, NumberOfFrames=1, **TWELVE, **elements))
        expected = np.clip((DEEP * float(slope) - 2047.5) / (width - 1) + 0.5, 0, 1)
        assert np.allclose(image.pixels, expected, atol=1e-6), elements
        assert (image.provenance["rescale_slope"], image.provenance["window_width"]) == (slope, width)


def test_intent_and_provenance_are_carried_and_name_no_patient(tmp_path):
    elements = {"RescaleSlope": "2", "RescaleIntercept": "-1000", "WindowCenter": "1500", "WindowWidth": "2001"}
    image = read_image(
        write_dicom(tmp_path / "a", DEEP, **TWELVE, **elements, **INVERTED, PresentationIntentType="FOR PROCESSING")
    )
    assert image.for_processing
    assert image.provenance == {
        "bits_stored": 12,
        "photometric_interpretation": "MONOCHROME1",
        "presentation_intent": "FOR PROCESSING",
        "modality": "rescale",
        "rescale_slope": 2.0,
        "rescale_intercept": -1000.0,
        "voi": "LINEAR",
        "window_center": 1500.0,
        "window_width": 2001.0,
    }
    tables = {"VOILUTSequence": look_up_table(np.arange(4096), 0, 12)}
    tables["ModalityLUTSequence"] = tables["VOILUTSequence"]
    image = read_image(write_dicom(tmp_path / "b", DEEP, **TWELVE, **tables, PresentationIntentType="FOR PRESENTATION"))
    assert not image.for_processing
    assert (image.provenance["modality"], image.provenance["voi"]) == ("Modality LUT", "VOI LUT")
    image = read_image(write_dicom(tmp_path / "c", DEEP, **TWELVE, PresentationIntentType="SECRET NAME"))
    assert not image.for_processing
    assert (image.provenance["presentation_intent"], image.provenance["voi"]) == ("", "none")


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        pytest.param({"RescaleSlope": "1e300", "RescaleIntercept": "0"}, "beyond float32", id="overflow of float32"),
        pytest.param({"RescaleSlope": "1e308", "RescaleIntercept": "0"}, "rescale overflows", id="overflow of float64"),
        pytest.param({"RescaleSlope": "1e-60", "RescaleIntercept": "0"}, "no contrast", id="vanishes in float32"),
        pytest.param({"RescaleSlope": "1", "RescaleIntercept": "1e30"}, "no contrast", id="swallowed by the intercept"),
        pytest.param({"WindowCenter": "-900", "WindowWidth": "100"}, "no contrast.*after its VOI LUT or window",
                     id="window beside the values"),
        pytest.param({"VOILUTSequence": look_up_table(np.zeros(4096), 0, 12)}, "no contrast", id="table of zeros"),
        pytest.param({"RescaleSlope": "8e34", "RescaleIntercept": "-1.7e38"}, "image",
                     id="just within float32"),
    ],
)  # fmt: skip
def test_image_that_overflows_or_has_no_contrast_is_refused(tmp_path, elements, reason):
    path = write_dicom(tmp_path / "a", DEEP, **TWELVE, **elements)
    if reason == "image":
        assert np.isfinite(read_image(path).pixels).all()
    else:
        refused(path, reason)


def test_values_that_float32_cannot_tell_apart_are_refused(tmp_path):
    refused(write_dicom(tmp_path / "even", DEEP * 2, BitsStored=1, HighBit=0), "no contrast: every pixel is 0")
    refused(write_dicom(tmp_path / "flat", np.full_like(DEEP, 7), **TWELVE), "no contrast: every pixel is 7")
    pixels = np.full_like(DEEP, 7)
    pixels[:, :6] = 0
    refused(write_dicom(tmp_path / "padded", pixels, PixelPaddingValue=0, **TWELVE), "no contrast: every pixel is 7")
    for name, values, reason in (
        ("huge", DEEP * 1e300, "beyond float32"),
        ("nan", np.where(DEEP == 4095, np.nan, DEEP), "NaN or infinite"),
        ("infinite", np.where(DEEP == 4095, np.inf, DEEP), "NaN or infinite"),
        ("fine", DEEP / 7.0, None),
    ):
        dataset = dicom(DEEP, WindowCenter="" if name == "huge" else 100, WindowWidth=400)
        del dataset.PixelData, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation
        dataset.BitsAllocated = 64
        dataset.DoubleFloatPixelData = np.asarray(values, np.float64).tobytes()
        dataset.save_as(tmp_path / name, enforce_file_format=True)
        if reason:
            refused(tmp_path / name, reason)
        else:
            assert np.allclose(read_image(tmp_path / name).pixels, np.clip((values - 99.5) / 399 + 0.5, 0, 1))

"""Single DICOM elements: texts that are not numbers, decimal commas, and elements of the wrong type are named."""

import numpy as np
import pydicom
import pytest
from sample_files import dicom, look_up_table, ramp, refused, write_dicom

from simsid.data import read_image

DEEP = ramp(16, 24, 4095, np.uint16)
TWELVE = {"BitsStored": 12, "HighBit": 11}


def with_text(path, pixels, **texts):
    """Write decimal strings that pydicom would refuse to write: each as a short string, whose VR is then changed."""
    dataset = dicom(pixels, **TWELVE)
    for keyword, text in texts.items():
        dataset.add_new(keyword, "SH", text)
    dataset.save_as(path, enforce_file_format=True)
    data = path.read_bytes()
    for keyword in texts:
        tag = pydicom.tag.Tag(keyword)
        start = tag.group.to_bytes(2, "little") + tag.element.to_bytes(2, "little")
        assert data.count(start + b"SH") == 1
        data = data.replace(start + b"SH", start + b"DS")
    path.write_bytes(data)
    return path


def test_decimal_comma_is_accepted(tmp_path):
    texts = {
        "RescaleSlope": "0,5",
        "RescaleIntercept": "-10,25",
        "WindowCenter": "1000,5\\7,1",
        "WindowWidth": "801 \\3",
    }
    image = read_image(with_text(tmp_path / "a", DEEP, **texts))
    assert image.provenance["rescale_slope"] == 0.5
    expected = np.clip((DEEP * 0.5 - 10.25 - 1000) / 800 + 0.5, 0, 1)
    assert np.allclose(image.pixels, expected, atol=1e-6)


@pytest.mark.parametrize("text", ["wide", "1.000,5", "1 2", "NaN", "inf"])
def test_unreadable_window_counts_as_none_and_unreadable_rescale_is_named(tmp_path, text):
    image = read_image(with_text(tmp_path / "a", DEEP, WindowCenter="2000", WindowWidth=text))
    assert not image.for_display
    assert np.array_equal(image.pixels, DEEP)
    path = with_text(tmp_path / "b", DEEP, RescaleSlope=text, RescaleIntercept="0")
    refused(path, r"Rescale Slope \(0028,1053\) is (not a number|nan|inf)")


def test_unreadable_element_is_named(tmp_path):
    sequence = look_up_table(np.arange(256), 0, 8)
    sequence[0].LUTDescriptor = [256, 0]
    refused(write_dicom(tmp_path / "a", ramp(), VOILUTSequence=sequence), r"LUT Descriptor \(0028,3002\) is not three")
    for keyword, name in (("BitsStored", "Bits Stored"), ("PixelPaddingValue", "Pixel Padding Value")):
        dataset = dicom(DEEP, **TWELVE)
        dataset.add_new(keyword, "LO", "many")
        dataset.save_as(tmp_path / keyword, enforce_file_format=True)
        refused(tmp_path / keyword, rf"the DICOM element {name} \(0028,\d+\) is not a whole number")
    dataset = dicom(DEEP, **TWELVE)
    dataset.add_new("VOILUTSequence", "UT", "Secret^Name")
    dataset.save_as(tmp_path / "sequence", enforce_file_format=True)
    refused(tmp_path / "sequence", r"VOI LUT Sequence \(0028,3010\) is not a sequence")

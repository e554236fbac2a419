"""Small image files that the tests of the data package make for themselves."""

import pathlib

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

DX = "1.2.840.10008.5.1.4.1.1.1.1"


def ramp(rows=12, columns=20, top=255, dtype=np.uint8):
    """A diagonal ramp from 0 to `top`: no axis, corner or half of it is like another."""
    values = np.arange(rows)[:, None] * 3 + np.arange(columns)
    return np.rint(values / values.max() * top).astype(dtype)


def save(path, pixels, **options):
    """Write an array (or a Pillow image) to `path`, in the format of its extension."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def dicom(pixels, **elements):
    """A DX image of an integer array, with further elements by keyword (`None` deletes one)."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = DX
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3.4"
    dataset.PatientName = "Secret^Name"
    dataset.PatientID = "hidden-id"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    data = pixels.tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    for keyword, value in elements.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return dataset


def write_dicom(path, pixels, **elements):
    """Write `dicom` to a file."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    dicom(pixels, **elements).save_as(path, enforce_file_format=True)
    return path


def look_up_table(entries, first, bits):
    """A modality or VOI LUT sequence of one item."""
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    item.LUTData = [int(value) for value in entries]
    item["LUTData"].VR = "US"
    return Sequence([item])

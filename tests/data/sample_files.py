"""Small image files that the tests of the data package make for themselves, and what their errors must look like."""

import os
import pathlib
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

from simsid.data import read_image
from simsid.errors import ReadError

DX = "1.2.840.10008.5.1.4.1.1.1.1"


def assert_sentence(reason):
    """One non-empty line of readable length, without a final stop or the patient of `dicom`."""
    assert reason
    assert "\n" not in reason
    assert len(reason) < 400
    assert not reason.endswith(".")
    assert "Secret" not in reason
    assert "hidden-id" not in reason


def refused(path, match, **options):
    """Assert that reading `path` raises ReadError with one sentence that matches and does not quote the path."""
    with pytest.raises(ReadError, match=match) as caught:
        read_image(path, **options)
    assert_sentence(str(caught.value))
    assert os.fspath(path) not in str(caught.value)


def ramp(rows=12, columns=20, top=255, dtype=np.uint8):
    """Return a diagonal ramp from 0 to `top`: no axis, corner or half of it is like another."""
    values = np.arange(rows)[:, None] * 3 + np.arange(columns)
    return np.rint(values / values.max() * top).astype(dtype)


def save(path, pixels, **options):
    """Write an array (or a Pillow image) to `path`, in the format of its extension."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def dicom(pixels, **elements):
    """Return a DX image of an integer array, with further elements by keyword (`None` deletes one)."""
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


def jpeg_dicom(path, pixels, data, syntax, **elements):
    """Write a DICOM file whose pixel data is the compressed `data`; `pixels` gives size and type alone."""
    dataset = dicom(pixels, **elements)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([data + b"\0" * (len(data) % 2)])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(path, enforce_file_format=True)
    return path


def compressed_dicom(path, syntax, pixels, **elements):
    """Write a DICOM file that pydicom compresses."""
    dataset = dicom(pixels, **elements)
    dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(path, enforce_file_format=True)
    return path


def gdcm_dicom(path, pixels, syntax, **elements):
    """Write a DICOM file that GDCM compresses, in the syntax of that name."""
    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(write_dicom(path, pixels, **elements)))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    assert writer.Write()
    return path


def write_tiff(path, pixels, order="<", photometric=1, bits=None, sample_format=1, orientation=1, byte_count=None):
    """Write a TIFF of one strip by hand, for the kinds that Pillow does not write."""
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    tags = {
        256: pixels.shape[1],
        257: pixels.shape[0],
        258: bits or 8 * pixels.dtype.itemsize,
        259: 1,
        262: photometric,
        273: 8,
        274: orientation,
        277: 1,
        278: pixels.shape[0],
        279: byte_count or len(data),
        339: sample_format,
    }
    directory = struct.pack(order + "H", len(tags))
    for tag, value in tags.items():
        directory += struct.pack(order + "HHII", tag, 4, 1, value)
    header = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data))
    path.write_bytes(header + data + directory + b"\0\0\0\0")
    return path


def png_chunk(kind, data):
    """One chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path, width, height, bits, color, rows, chunks=b""):
    """Write a PNG from raw scan lines, for the kinds that Pillow does not write and sizes that nobody has."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + chunks + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def look_up_table(entries, first, bits):
    """Return a modality or VOI LUT sequence of one item."""
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    item.LUTData = [int(value) for value in entries]
    item["LUTData"].VR = "US"
    return Sequence([item])


def gray(rows, value):
    pixels = np.full((rows, 14), value, np.uint8)
    pixels[:, -1] += 40
    return pixels


def grays(images):
    return images.pixels.to(torch.int64)[:, 0, 0, 0].tolist()


DEEP = ramp(40, 50, 65535, np.uint16)

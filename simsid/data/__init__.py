"""Radiographs and DigitAnatomy: lists of images, reading and decoding, augmentation."""

from simsid.data.augmentation import augment
from simsid.data.datasets import CheXpert, COVIDx, Dataset, Radiographs, ZhangLab, iter_records, open_dataset
from simsid.data.digits import DigitAnatomy
from simsid.data.images import ImageSet, load_images, stream_images
from simsid.data.reading import DecodedImage, read_image
from simsid.data.records import Failure, Record, read_csv, split_by_patient, write_csv
from simsid.data.scanning import ScanReport, scan
from simsid.errors import ReadError

__all__ = [
    "COVIDx",
    "CheXpert",
    "Dataset",
    "DecodedImage",
    "DigitAnatomy",
    "Failure",
    "ImageSet",
    "Radiographs",
    "ReadError",
    "Record",
    "ScanReport",
    "ZhangLab",
    "augment",
    "iter_records",
    "load_images",
    "open_dataset",
    "read_csv",
    "read_image",
    "scan",
    "split_by_patient",
    "stream_images",
    "write_csv",
]

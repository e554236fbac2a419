"""Radiographs and DigitAnatomy: lists of images, decoding, preprocessing, splits and augmentation."""

from simsid.data.augmentation import augment
from simsid.data.datasets import SAMPLES, CheXpert, COVIDx, Dataset, Radiographs, ZhangLab, iter_records, open_dataset
from simsid.data.digits import DigitAnatomy
from simsid.data.files import read
from simsid.data.images import ImageSet, load_images, stream_images
from simsid.data.preprocessing import Preprocessing
from simsid.data.reading import DecodedImage, read_image
from simsid.data.records import Failure, Record, missing_files, read_csv, write_csv
from simsid.data.scanning import ScanReport, scan
from simsid.data.sources import as_batches, as_image_set
from simsid.data.splits import partition, split_by_patient
from simsid.errors import ReadError

__all__ = [
    "SAMPLES",
    "COVIDx",
    "CheXpert",
    "Dataset",
    "DecodedImage",
    "DigitAnatomy",
    "Failure",
    "ImageSet",
    "Preprocessing",
    "Radiographs",
    "ReadError",
    "Record",
    "ScanReport",
    "ZhangLab",
    "as_batches",
    "as_image_set",
    "augment",
    "iter_records",
    "load_images",
    "missing_files",
    "open_dataset",
    "partition",
    "read",
    "read_csv",
    "read_image",
    "scan",
    "split_by_patient",
    "stream_images",
    "write_csv",
]

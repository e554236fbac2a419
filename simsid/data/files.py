"""Prepares one image, a file or an array of gray values, as a model takes it."""

import hashlib
import os
import stat
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from simsid.data.preprocessing import ImageSize, Preprocessing, to_float
from simsid.data.reading import MAX_PIXELS, DecodedImage, one_sentence, read_image
from simsid.data.records import Failure, Record
from simsid.errors import InputError, InputTypeError, NonFiniteError, ReadError, printable


def read(
    path_or_array: str | os.PathLike[str] | np.ndarray | Tensor,
    model_or_preprocessing: object = None,
    *,
    image_size: ImageSize = 128,
    aspect: str = "stretch",
    intensity: str = "auto",
) -> Tensor:
    """Prepare one image, a file or an array of gray values, for a model: float32 `[1, 1, H, W]` in -1..1.

    The result is bitwise that of `load_images` for the same gray values and options.

    Args:
        path_or_array: an image file, or gray values `[H, W]`, larger is brighter: uint8 and uint16 have the display
            range of their dtype, other integers and floats none (intensity `"auto"` uses their percentiles).
        model_or_preprocessing: a model, or any object whose `preprocessing` has the fields of `Preprocessing`; or those
            fields themselves.
        image_size, aspect, intensity: used where `model_or_preprocessing` is None; see `Preprocessing`.

    Raises:
        ReadError: the file cannot be read; the message has its path.
        InputTypeError, InputError, NonFiniteError: an array or an argument that cannot be used.
    """
    preprocessing = Preprocessing(image_size, aspect, intensity)
    if model_or_preprocessing is not None:
        if preprocessing != Preprocessing():
            raise InputError("image_size, aspect and intensity must be left out beside model_or_preprocessing")
        preprocessing = _preprocessing_of(model_or_preprocessing)
    if isinstance(path_or_array, (np.ndarray, Tensor)):
        pixels = preprocessing.quantize(_decoded_from_array(path_or_array))
    elif isinstance(path_or_array, (str, os.PathLike)):
        pixels = FileReader(preprocessing).decode(Record(os.fspath(path_or_array))).pixels
    else:
        raise InputTypeError(f"path_or_array must be a path or a 2-D array, got {type(path_or_array).__name__}")
    return to_float(torch.from_numpy(pixels))[None, None]


def _preprocessing_of(owner: object) -> Preprocessing:
    """Return the preprocessing of a model, or the object itself where it is one."""
    options: Any = getattr(owner, "preprocessing", owner)
    try:
        return Preprocessing(options.image_size, options.aspect, options.intensity)
    except AttributeError:
        got = type(owner).__name__
        raise InputTypeError(f"model_or_preprocessing must be a model or a Preprocessing, got {got}") from None


class Decoded(NamedTuple):
    """One file that was read.

    `pixels` `[H, W]` uint8 or uint16; `sha256` of the file in hexadecimal, `""` if not wanted; `provenance` as `Record`
    has it.
    """

    pixels: np.ndarray
    sha256: str
    provenance: dict[str, str | int | float]


class FileReader:
    """Reads, hashes and preprocesses one file at a time; called with a record, it returns failures as values."""

    def __init__(self, preprocessing: Preprocessing, max_pixels: int = MAX_PIXELS, *, hash_files: bool = False) -> None:
        self.preprocessing = preprocessing
        self.max_pixels = max_pixels
        self.hash_files = hash_files

    def __call__(self, record: Record) -> Decoded | Failure:
        """Return the decoded file, or why it could not be read, whatever went wrong."""
        digest = ""
        try:
            with open_file(record.path) as file:
                # The hash is that of the file which is decoded: one handle, even if another file takes its name.
                digest = _sha256(file) if self.hash_files else ""
                image = read_image(file, max_pixels=self.max_pixels)
            rows, columns = image.pixels.shape
            about = {"format": image.format, "rows": rows, "columns": columns, "bits": image.bits, **image.provenance}
            return Decoded(self.preprocessing.quantize(image), digest, about)
        except ReadError as error:
            return Failure(record.path, str(error), digest)
        except Exception as error:  # a defect of one file must not stop a run over thousands
            return Failure(record.path, f"the image cannot be prepared: {one_sentence(error)}", digest)

    def decode(self, record: Record) -> Decoded:
        """Return the decoded file.

        Raises:
            ReadError: the file cannot be read; the message has its path.
        """
        result = self(record)
        if isinstance(result, Failure):
            raise ReadError(f"{printable(result.path)}: {result.reason}")
        return result


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file that is not empty.

    Raises:
        ReadError: anything else, with the reason; a pipe or a device would block for ever.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            os.scandir(path).close()
            raise ReadError("the path is a folder, not a file")
        if not stat.S_ISREG(status.st_mode):
            raise ReadError("the path is not a regular file")
        if status.st_size == 0:
            raise ReadError("the file is empty")
        return open(path, "rb")
    except OSError as error:
        what = "folder cannot be listed" if os.path.isdir(path) else "file cannot be read"
        raise ReadError(f"the {what}: {error.strerror or error}") from error


def _sha256(file: BinaryIO) -> str:
    """Return the hash of a file, block by block so that the memory stays bounded, and rewind it."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    file.seek(0)
    return digest.hexdigest()


def _decoded_from_array(array: np.ndarray | Tensor) -> DecodedImage:
    """Describe an array of gray values as if it had been decoded from a file."""
    pixels = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    if pixels.ndim != 2 or not pixels.size:
        raise InputError(f"path_or_array must have shape [H, W], got {list(pixels.shape)}")
    if pixels.dtype in (np.uint8, np.uint16):
        bits = 8 * pixels.dtype.itemsize
        return DecodedImage(pixels, (0.0, 2.0**bits - 1), for_display=bits == 8, bits=bits, format="")
    if pixels.dtype.kind not in "iuf":
        raise InputTypeError(f"path_or_array must hold integers or floats, got dtype {pixels.dtype}")
    if not np.isfinite(pixels).all():
        raise NonFiniteError("path_or_array must be finite, got NaN or infinite gray values")
    return DecodedImage(pixels.astype(np.float32), None, for_display=False, bits=32, format="")

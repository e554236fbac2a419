"""Decodes images in parallel, brings them to one size, and holds them in memory as 8 or 16 bits."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils import data

from simsid.arguments import require_whole_number
from simsid.data.files import Decoded, FileReader
from simsid.data.preprocessing import ImageSize, Preprocessing, to_float, value_range
from simsid.data.reading import MAX_PIXELS
from simsid.data.records import Failure, Record, failure_summary
from simsid.errors import InputError, InputTypeError
from simsid.parallel import in_order, thread_count, with_progress

# Failures per batch of `stream_images`: a folder of broken files must neither fill the memory nor look stuck.
FAILURES_AT_ONCE = 256

Source = Record | str | os.PathLike[str]
Index = Tensor | np.ndarray | Sequence[int] | slice
# How `load_images` applies a reader to all files: (reader, records, threads) to (record, result) in order.
Decode = Callable[[FileReader, list[Record], int], Iterable[tuple[Record, Decoded | Failure]]]


@dataclass(frozen=True, eq=False)
class ImageSet(data.Dataset):
    """Decoded images in memory: a torch `Dataset` whose items are (image, label).

    Args:
        pixels: `[n, 1, H, W]`, uint8, or uint16 when any source is deeper than 8 bits (8-bit values times 257 then), 0
            is black; or float32 in -1..1, -1 is black.
        records: one for each image.
        failures: the files that could not be read; they have no image.
        sha256: hash of each image's file in hexadecimal, `""` for an image that is not a file; empty when unknown.

    Raises:
        InputError: shape, dtype, lengths or float values do not fit.
        NonFiniteError: float pixels that are NaN or infinite.
    """

    pixels: Tensor = field(repr=False)
    records: tuple[Record, ...] = field(repr=False)
    failures: tuple[Failure, ...] = ()
    sha256: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.pixels.dim() != 4 or self.pixels.shape[1] != 1:
            raise InputError(f"pixels must have shape [n, 1, H, W], got {list(self.pixels.shape)}")
        if self.pixels.dtype not in (torch.uint8, torch.uint16, torch.float32):
            raise InputError(f"pixels must be uint8 or uint16, or float32 in -1..1, got {self.pixels.dtype}")
        if len(self.records) != len(self.pixels):
            raise InputError(f"records must be one for each image, got {len(self.records)} for {len(self.pixels)}")
        if self.sha256 and len(self.sha256) != len(self.pixels):
            raise InputError(f"sha256 must be one for each image, got {len(self.sha256)} for {len(self.pixels)}")
        if self.pixels.is_floating_point():
            value_range(self.pixels, "pixels")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one image as float32 `[1, H, W]` in -1..1 and its label as int64, -1 where it is unknown."""
        index = range(len(self))[index]
        label = self.records[index].label
        return self.batch([index], self.pixels.device)[0], torch.tensor(-1 if label is None else label)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[2], self.pixels.shape[3]

    @property
    def labels(self) -> np.ndarray:
        """`[n]` int64: 0 normal, 1 abnormal, -1 unknown."""
        return np.array([-1 if record.label is None else record.label for record in self.records], np.int64)

    @property
    def findings(self) -> list[str]:
        """The class of each image, `""` where it is unknown."""
        return [record.finding for record in self.records]

    @property
    def paths(self) -> list[str]:
        """The file, or the name, of each image."""
        return [record.path for record in self.records]

    def batch(self, index: Index, device: torch.device | str = "cpu") -> Tensor:
        """Return the images of `index` (indices, a slice or a mask) as float32 `[b, 1, H, W]` in -1..1.

        The values of an image are bitwise the same whether the set is uint8 or uint16, and on every device.
        """
        pixels = _take(self.pixels, _indices(index, len(self), self.pixels.device))
        device = torch.device(device)
        if device.type == "cuda" and not pixels.is_cuda:
            # A copy from pageable memory would make the host wait for all queued work of the device.
            pixels = pixels.pin_memory()
        # Only towards the device: a non-blocking copy to the host could be read before it is complete.
        return to_float(pixels.to(device, non_blocking=device.type == "cuda"))

    def batches(self, size: int = 256) -> Iterator[Tensor]:
        """Yield all images in order, as `batch` returns them, `size` at a time, on the device of the pixels."""
        for start in range(0, len(self), size):
            yield self.batch(slice(start, start + size), self.pixels.device)

    def select(self, mask_or_index: Index) -> "ImageSet":
        """Return the images of a mask or of indices, in that order, without the failures."""
        indices = _indices(mask_or_index, len(self), self.pixels.device)
        chosen = indices.tolist()
        hashes = tuple(self.sha256[i] for i in chosen) if self.sha256 else ()
        return ImageSet(_take(self.pixels, indices), tuple(self.records[i] for i in chosen), sha256=hashes)

    def to(self, device: torch.device | str) -> "ImageSet":
        """Return the set with its pixels on `device`, where `batch` and `batches` then need no copy."""
        return replace(self, pixels=self.pixels.to(device))


def load_images(
    records: Iterable[Source],
    image_size: ImageSize = 128,
    *,
    aspect: str = "stretch",
    intensity: str = "auto",
    workers: int | None = None,
    progress: bool = False,
    max_pixels: int = MAX_PIXELS,
    decode: Decode = in_order,
) -> ImageSet:
    """Decode images in parallel threads and keep them in memory, in the given order.

    Each file is opened once and hashed on the way: `ImageSet.sha256`, and `Failure.sha256` for those that fail.

    Args:
        records: records, or paths.
        image_size, aspect, intensity: see `Preprocessing`.
        workers: threads; None is one per core.
        progress: show a progress bar.
        max_pixels: see `read_image`.
        decode: applies a function to all files; `ProcessGroup.in_order` divides the files among ranks.

    Returns:
        The images that could be read; `ImageSet.failures` has the others, each with its reason.

    Raises:
        InputTypeError: `records` is a single path.
        InputError: an unknown option, no image, or every file fails.
    """
    files = [_as_record(source) for source in _sequence_of_files(records)]
    if not files:
        raise InputError("records must name at least one image, got none")
    reader = FileReader(Preprocessing(image_size, aspect, intensity), max_pixels, hash_files=True)
    decoded = decode(reader, files, thread_count(workers))
    if progress:
        decoded = with_progress(decoded, len(files), "reading")

    pixels = np.empty((len(files), 1, *reader.preprocessing.size), np.uint8)
    loaded: list[Record] = []
    hashes: list[str] = []
    failures: list[Failure] = []
    for record, result in decoded:
        if isinstance(result, Failure):
            failures.append(result)
            continue
        if result.pixels.dtype == np.uint16 and pixels.dtype == np.uint8:
            pixels = _widen(pixels)
        pixels[len(loaded), 0] = _widen(result.pixels) if pixels.dtype != result.pixels.dtype else result.pixels
        loaded.append(replace(record, provenance=result.provenance))
        hashes.append(result.sha256)
    if not loaded:
        raise InputError(failure_summary(failures, len(files)))
    return ImageSet(torch.from_numpy(pixels[: len(loaded)]), tuple(loaded), tuple(failures), tuple(hashes))


def stream_images(
    paths_or_records: Iterable[Source],
    image_size: ImageSize = 128,
    *,
    aspect: str = "stretch",
    intensity: str = "auto",
    workers: int | None = None,
    batch_size: int = 16,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[tuple[Tensor, list[Record], list[Failure]]]:
    """Decode images ahead in parallel and yield them in batches, in the given order and in bounded memory.

    Every batch has `batch_size` images except the last, and except a batch that comes with 256 failures. The values
    are bitwise those of `load_images` with the same options, see there.

    Yields:
        Float32 `[b, 1, H, W]` in -1..1, the b records, and the files that failed since the previous batch.

    Raises:
        InputTypeError: at the call, `paths_or_records` is a single path.
        InputError: at the call, an unknown option. A file never raises.
    """
    batch_size = require_whole_number("batch_size", batch_size, least=1)
    reader = FileReader(Preprocessing(image_size, aspect, intensity), max_pixels)
    return _batches(map(_as_record, _sequence_of_files(paths_or_records)), reader, thread_count(workers), batch_size)


def _batches(
    records: Iterable[Record], reader: FileReader, workers: int, batch_size: int
) -> Iterator[tuple[Tensor, list[Record], list[Failure]]]:
    images: list[Tensor] = []
    done: list[Record] = []
    failures: list[Failure] = []
    empty = torch.empty(0, 1, *reader.preprocessing.size)
    for record, result in in_order(reader, records, workers, batch_size):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            images.append(to_float(torch.from_numpy(result.pixels)))
            done.append(replace(record, provenance=result.provenance))
        if len(done) == batch_size or len(failures) == FAILURES_AT_ONCE:
            yield torch.stack(images)[:, None] if images else empty, done, failures
            images, done, failures = [], [], []
    if done or failures:
        yield torch.stack(images)[:, None] if images else empty, done, failures


def _sequence_of_files(records: Iterable[Source]) -> Iterable[Source]:
    """Refuse a single path, which would be read letter by letter."""
    if isinstance(records, (str, bytes, os.PathLike, Record)) or not isinstance(records, Iterable):
        got = f"the path {os.fspath(records)!r}" if isinstance(records, (str, os.PathLike)) else type(records).__name__
        raise InputTypeError(
            f"records must be a list of records or paths, got {got}; open a folder with simsid.data.open_dataset"
        )
    return records


def _as_record(source: Source) -> Record:
    if isinstance(source, Record):
        return source
    if isinstance(source, (str, os.PathLike)):
        return Record(os.fspath(source))
    raise InputTypeError(f"records must be a list of records or paths, got an item of type {type(source).__name__}")


def _widen(pixels: np.ndarray) -> np.ndarray:
    """Turn uint8 into uint16: the factor 257 takes 255 to 65535."""
    return pixels.astype(np.uint16) * np.uint16(257)


def _indices(index: Index, n: int, device: torch.device) -> Tensor:
    """Turn indices, a slice or a mask into int64 indices on `device`."""
    if isinstance(index, slice):
        return torch.arange(n, device=device)[index]
    indices = torch.as_tensor(index)
    if indices.dim() != 1:
        raise InputError(f"index must have one dimension, got {indices.dim()}")
    if indices.dtype == torch.bool:
        if len(indices) != n:
            raise InputError(f"index must be a mask of {n} values, got {len(indices)}")
        return indices.nonzero()[:, 0].to(device)
    if indices.is_floating_point() and len(indices):
        raise InputError(f"index must be whole numbers or a mask, got {indices.dtype}")
    return indices.to(device, torch.int64)


def _take(pixels: Tensor, indices: Tensor) -> Tensor:
    # Indexing is not implemented for uint16 on every device.
    if pixels.dtype == torch.uint16:
        return pixels.view(torch.int16)[indices].view(torch.uint16)
    return pixels[indices]

"""Decodes images in parallel, brings them to one size, and holds them in memory as 8 or 16 bits."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simsid.data.reading import MAX_PIXELS, DecodedImage, one_sentence, read_image
from simsid.data.records import Failure, Record
from simsid.errors import ReadError
from simsid.parallel import in_order, thread_count, with_progress

ASPECTS = ("stretch", "pad", "crop")
INTENSITIES = ("auto", "range", "minmax")
# Failures that `stream_images` gathers at most: a folder of broken files must neither fill the memory nor look stuck.
FAILURES_AT_ONCE = 256
# Per cent of the pixels that "auto" may clip at either end where a file says no display range.
CLIPPED = 0.1

Source = Record | str | os.PathLike[str]
ImageSize = int | tuple[int, int]
Index = Tensor | np.ndarray | Sequence[int] | slice


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Decoded images resident in memory.

    Arguments:
        pixels: ``[n, 1, H, W]``, uint8, or uint16 when any source is deeper than 8 bits (8-bit values times 257 then);
            0 is black.
        records: one for each image.
        failures: the files that could not be read; they have no image.
    Raises: ValueError where shape, dtype or lengths do not fit.
    """

    pixels: Tensor = field(repr=False)
    records: tuple[Record, ...] = field(repr=False)
    failures: tuple[Failure, ...] = ()

    def __post_init__(self) -> None:
        if self.pixels.dim() != 4 or self.pixels.shape[1] != 1:
            raise ValueError(f"pixels must be [n, 1, H, W], got shape {list(self.pixels.shape)}")
        if self.pixels.dtype not in (torch.uint8, torch.uint16):
            raise ValueError(f"pixels must be uint8 or uint16, got {self.pixels.dtype}")
        if len(self.records) != len(self.pixels):
            raise ValueError(f"there are {len(self.pixels)} images but {len(self.records)} records")

    def __len__(self) -> int:
        return len(self.records)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[2], self.pixels.shape[3]

    @property
    def labels(self) -> np.ndarray:
        """``[n]`` int64: 0 normal, 1 abnormal, -1 unknown."""
        return np.array([-1 if record.label is None else record.label for record in self.records], np.int64)

    @property
    def findings(self) -> list[str]:
        """The class of each image, ``""`` unknown."""
        return [record.finding for record in self.records]

    @property
    def paths(self) -> list[str]:
        """The file, or the name, of each image."""
        return [record.path for record in self.records]

    def batch(self, index: Index, device: torch.device | str = "cpu") -> Tensor:
        """Return the images of `index` (places, a slice or a mask) as float32 ``[b, 1, H, W]`` in [-1, 1].

        The values of an image are bitwise the same whether the set is uint8 or uint16, and on every device.
        """
        pixels = _take(self.pixels, _places(index, len(self), self.pixels.device))
        device = torch.device(device)
        if device.type == "cuda" and not pixels.is_cuda:
            # From pinned memory, or the host would wait for all that the device still has to do.
            pixels = pixels.pin_memory()
        # Towards the host a copy that nobody waits for would be read before it is there.
        return _to_float(pixels.to(device, non_blocking=device.type == "cuda"))

    def batches(self, size: int = 256) -> Iterator[Tensor]:
        """Yield all images in order, as `batch` returns them, `size` at a time, where the pixels are."""
        for start in range(0, len(self), size):
            yield self.batch(slice(start, start + size), self.pixels.device)

    def select(self, mask_or_index: Index) -> "ImageSet":
        """Return the images of a mask or of places, in that order, without the failures."""
        places = _places(mask_or_index, len(self), self.pixels.device)
        return ImageSet(_take(self.pixels, places), tuple(self.records[i] for i in places.tolist()))

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
    decode: Callable[[Callable, list[Record], int], Iterable[tuple[Record, object]]] = in_order,
) -> ImageSet:
    """Decode images in parallel threads and keep them in memory, in the order given.

    Arguments:
        records: records, or paths.
        image_size: pixels of height and width, one number for a square, or (height, width).
        aspect: how another shape fits: ``"stretch"`` (the papers), ``"pad"`` with black, ``"crop"`` to the centre.
        intensity: which values become black and white:
            ``"auto"``: what the file means for display: 0 and 255 for 8 bits, the ends of the VOI LUT or window for
            DICOM; else (16-bit PNG and TIFF, DICOM without a window, floats) the image's own 0.1 and 99.9 percentiles,
            since such files use an unknown part of their range and a few hot pixels must not decide.
            ``"range"``: all that the samples can hold (65535 for 16 bits), or the window; an error for 32 bits.
            ``"minmax"``: the image's own least and greatest value.
        workers: threads, ``None`` for one a core.
        progress: show a bar.
        max_pixels: see `read_image`.
        decode: what goes through the files; several processes that each decode a share put another in.
    Returns: the images that could be read; `ImageSet.failures` has the others, each with its reason.
    Raises: ValueError for an unknown option, for no image, or where every file fails.
    """
    records = [_as_record(source) for source in records]
    if not records:
        raise ValueError("there is no image to load")
    plan = _Plan.checked(image_size, aspect, intensity, max_pixels)
    decoded = decode(plan.read, records, thread_count(workers))
    if progress:
        decoded = with_progress(decoded, len(records), "reading")

    pixels = np.empty((len(records), 1, *plan.size), np.uint8)
    loaded: list[Record] = []
    failures: list[Failure] = []
    for record, result in decoded:
        if isinstance(result, Failure):
            failures.append(result)
            continue
        if result.dtype == np.uint16 and pixels.dtype == np.uint8:
            pixels = _widen(pixels)
        pixels[len(loaded), 0] = _widen(result) if pixels.dtype != result.dtype else result
        loaded.append(record)
    if not loaded:
        raise ValueError(
            f"none of the {len(records)} files could be read; the first, {failures[0].path}: {failures[0].reason}"
        )
    return ImageSet(torch.from_numpy(pixels[: len(loaded)]), tuple(loaded), tuple(failures))


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
    """Decode images ahead in parallel and yield them in batches, in the order given and in bounded memory.

    Every batch has `batch_size` images; fewer, or none, only the last and one that comes with 256 failures. The values
    are bitwise those of `load_images` with the same options, which says what these mean.

    Yields: ``[b, 1, H, W]`` float32 in [-1, 1], the b records, and the files that failed since the batch before.
    Raises: ValueError, at the call, for an unknown option; never for a file.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    plan = _Plan.checked(image_size, aspect, intensity, max_pixels)
    return _batches(map(_as_record, paths_or_records), plan, thread_count(workers), batch_size)


def quantised(
    image: DecodedImage, image_size: ImageSize = 128, *, aspect: str = "stretch", intensity: str = "auto"
) -> np.ndarray:
    """Bring a decoded image to its range and size: ``[H, W]``, uint8, or uint16 where it is deeper than 8 bits.

    Values are mapped and clipped at full size and depth, resized in float32 with an antialiased bilinear filter, and
    rounded once. Options as in `load_images`. Raises: ReadError where ``"range"`` has no range to use.
    """
    return _Plan.checked(image_size, aspect, intensity, MAX_PIXELS).apply(image)


@dataclass(frozen=True)
class _Plan:
    """What happens to every image, checked once."""

    size: tuple[int, int]
    aspect: str
    intensity: str
    max_pixels: int

    @classmethod
    def checked(cls, image_size: ImageSize, aspect: str, intensity: str, max_pixels: int) -> "_Plan":
        size = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
        if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
            raise ValueError(f"image_size must be one or two positive whole numbers, got {image_size!r}")
        for name, value, choices in (("aspect", aspect, ASPECTS), ("intensity", intensity, INTENSITIES)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        return cls(size, aspect, intensity, max_pixels)

    def read(self, record: Record) -> "np.ndarray | Failure":
        try:
            return self.apply(read_image(record.path, max_pixels=self.max_pixels))
        except ReadError as error:
            return Failure(record.path, str(error))
        except Exception as error:  # one file, whatever is wrong with it, must not stop a run of thousands
            return Failure(record.path, f"the image cannot be prepared: {one_sentence(error)}")

    def apply(self, image: DecodedImage) -> np.ndarray:
        values = _resize(_normalise(image, self.intensity), self.size, self.aspect)
        top, dtype = (255, np.uint8) if image.bits <= 8 else (65535, np.uint16)
        return np.rint(np.clip(values, 0, 1) * np.float32(top)).astype(dtype)


def _normalise(image: DecodedImage, intensity: str) -> np.ndarray:
    """Map grey values to float32 ``[H, W]`` in [0, 1]."""
    measured = image.pixels if image.padding is None else image.pixels[~image.padding]
    if intensity == "minmax":
        low, high = float(measured.min()), float(measured.max())
    elif intensity == "range" or image.for_display:
        if image.declared is None:
            raise ReadError(f"{image.bits}-bit samples declare no range; use intensity 'auto' or 'minmax'")
        low, high = image.declared
    else:
        low, high = (float(value) for value in np.percentile(measured, (CLIPPED, 100 - CLIPPED)))
        if high <= low:  # nearly all pixels are alike
            low, high = float(measured.min()), float(measured.max())
    if high <= low:
        return np.zeros(image.pixels.shape, np.float32)
    # Subtracting in the samples' own float type keeps 16 bits exact; float64 only where float32 would not.
    values = (image.pixels.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    values = np.clip(values, 0, 1, out=values)
    if image.padding is not None:
        values[image.padding] = 0
    return values


def _resize(values: np.ndarray, size: tuple[int, int], aspect: str) -> np.ndarray:
    """Resize float32 ``[H, W]`` to `size`; Pillow's bilinear filter widens when it shrinks, so it does not alias."""
    rows, columns = values.shape
    height, width = size
    image = Image.fromarray(values)
    if aspect == "pad":
        scale = min(height / rows, width / columns)
        inner = max(1, round(rows * scale)), max(1, round(columns * scale))
        top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
        padded = np.zeros(size, np.float32)
        padded[top : top + inner[0], left : left + inner[1]] = image.resize(inner[::-1], Image.Resampling.BILINEAR)
        return padded
    box = (0.0, 0.0, float(columns), float(rows))
    if aspect == "crop":
        scale = max(height / rows, width / columns)
        across, down = width / scale, height / scale
        left, top = (columns - across) / 2, (rows - down) / 2
        # Rounding may reach past the border by 1e-13, which Pillow refuses.
        box = (max(left, 0.0), max(top, 0.0), min(left + across, columns), min(top + down, rows))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box))


def _batches(
    records: Iterable[Record], plan: _Plan, workers: int, batch_size: int
) -> Iterator[tuple[Tensor, list[Record], list[Failure]]]:
    images: list[Tensor] = []
    done: list[Record] = []
    failures: list[Failure] = []
    empty = torch.empty(0, 1, *plan.size)
    for record, result in in_order(plan.read, records, workers, batch_size):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            images.append(_to_float(torch.from_numpy(result)))
            done.append(record)
        if len(done) == batch_size or len(failures) == FAILURES_AT_ONCE:
            yield torch.stack(images)[:, None] if images else empty, done, failures
            images, done, failures = [], [], []
    if done or failures:
        yield torch.stack(images)[:, None] if images else empty, done, failures


def _as_record(source: Source) -> Record:
    return source if isinstance(source, Record) else Record(os.fspath(source))


def _widen(pixels: np.ndarray) -> np.ndarray:
    """Turn uint8 into uint16: 257 takes 255 to 65535."""
    return pixels.astype(np.uint16) * np.uint16(257)


def _to_float(pixels: Tensor) -> Tensor:
    """Turn uint8 or uint16 into float32 in [-1, 1], both ends exact.

    8 bits pass through 16, and the scale is a product (a division by a number is another rounding on CUDA), so that
    neither the cache's depth nor the device can be seen in the values.
    """
    if pixels.dtype == torch.uint8:
        wide = pixels.to(torch.int32) * 257
    else:
        # int16 has every operation on every device, uint16 has few.
        wide = pixels.view(torch.int16).to(torch.int32) & 0xFFFF
    return (wide.to(torch.float32) - 32767.5) * (1 / 32767.5)


def _places(index: Index, n: int, device: torch.device) -> Tensor:
    """Turn places, a slice or a mask into int64 places on `device`."""
    if isinstance(index, slice):
        return torch.arange(n, device=device)[index]
    places = torch.as_tensor(index)
    if places.dim() != 1:
        raise ValueError(f"the index must have one dimension, got {places.dim()}")
    if places.dtype == torch.bool:
        if len(places) != n:
            raise ValueError(f"the mask has {len(places)} values for {n} images")
        return places.nonzero()[:, 0].to(device)
    if places.is_floating_point() and len(places):
        raise ValueError(f"the index must be whole numbers or a mask, got {places.dtype}")
    return places.to(device, torch.int64)


def _take(pixels: Tensor, places: Tensor) -> Tensor:
    if pixels.dtype == torch.uint16:
        return pixels.view(torch.int16)[places].view(torch.uint16)
    return pixels[places]

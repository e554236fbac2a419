"""Maps decoded gray values to what a model takes: one range, one size, and 8 or 16 bits that become -1..1."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simsid.data.decoded import DecodedImage, bands, extremes, pixels_inside
from simsid.errors import InputError, NonFiniteError, ReadError

ASPECTS = ("stretch", "pad", "crop")
INTENSITIES = ("auto", "range", "minmax")
# Percentage of the pixels that "auto" may clip at either end where a file declares no display range.
CLIPPED = 0.1
# Values may leave -1..1 by this much: interpolation and half precision round.
TOLERANCE = 1e-3
# Pixels up to which an image is resized in one step.
AT_ONCE = 2**24

ImageSize = int | tuple[int, int]


@dataclass(frozen=True)
class Preprocessing:
    """How gray values of any size and depth become the image that a model takes.

    Args:
        image_size: height and width in pixels, one number for a square, or (height, width).
        aspect: how another shape fits: `"stretch"` (the papers), `"pad"` with black, `"crop"` to the center.
        intensity: which values become black and white:
            `"auto"`: the range that the file declares for display: 0 and 255 for 8 bits, the ends of the VOI LUT or
            window for DICOM; otherwise (16-bit PNG and TIFF, DICOM without a window, floats) the image's own 0.1 and
            99.9 percentiles, because such files use an unknown part of their range and a few hot pixels must not
            decide.
            `"range"`: all values that a sample can hold (65535 for 16 bits), or the window; an error for 32 bits.
            `"minmax"`: the image's own minimum and maximum.

    Raises:
        InputError: an image size that is not positive whole numbers, or an unknown `aspect` or `intensity`.
    """

    image_size: ImageSize = 128
    aspect: str = "stretch"
    intensity: str = "auto"

    def __post_init__(self) -> None:
        size = self.image_size
        sides = tuple(size) if isinstance(size, Sequence) and not isinstance(size, str) else (size, size)
        if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
            raise InputError(f"image_size must be one or two positive whole numbers, got {size!r}")
        if not isinstance(size, int):
            object.__setattr__(self, "image_size", sides)
        for name, value, choices in (
            ("aspect", self.aspect, ASPECTS),
            ("intensity", self.intensity, INTENSITIES),
        ):
            if value not in choices:
                raise InputError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name: options of `load_images`, `stream_images` and `read`, and plain JSON."""
        return {"image_size": self.image_size, "aspect": self.aspect, "intensity": self.intensity}

    def quantize(self, image: DecodedImage) -> np.ndarray:
        """Return the image as `[H, W]`, uint8, or uint16 where it is deeper than 8 bits; 0 is black.

        Values are mapped and clipped at full size and depth, resized in float32 with an antialiased bilinear filter,
        and rounded once.

        Raises:
            ReadError: intensity `"range"` for an image that declares no range.
        """
        values = _resize(image, _range(image, self.intensity), self.size, self.aspect)
        top, dtype = (255, np.uint8) if image.bits <= 8 else (65535, np.uint16)
        return np.rint(np.clip(values, 0, 1) * np.float32(top)).astype(dtype)

    def gray(self, image: DecodedImage) -> np.ndarray:
        """Return the gray values that `quantize` resizes, at the image's own size: `[H, W]` uint8, 0 is black.

        Raises:
            ReadError: intensity `"range"` for an image that declares no range.
        """
        limits = _range(image, self.intensity)
        rows, columns = image.pixels.shape
        pixels = np.empty((rows, columns), np.uint8)
        for band in bands(rows, columns):
            pixels[band] = np.rint(_normalized(image, band, *limits) * np.float32(255))
        return pixels

    def at_own_size(self, values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """Bring a map of the model's image back to the image it was made of, bilinearly: the inverse of `aspect`.

        Args:
            values: `[*size]`, floating point.
            shape: height and width of the image, upright, before preprocessing.

        Returns:
            `[*shape]` float32; with `"crop"`, NaN where the model saw nothing. What lies on the black bars of `"pad"`
            is dropped.

        Raises:
            InputError: `values` does not have the size of this preprocessing.
        """
        if np.shape(values) != self.size:
            raise InputError(f"values must have shape {list(self.size)}, got {list(np.shape(values))}")
        image = Image.fromarray(np.asarray(values, np.float32))
        if self.aspect == "crop":
            return _uncropped(image, shape, self.size)
        if self.aspect == "pad":
            top, left, height, width = _padded_window(shape, self.size)
            image = image.crop((left, top, left + width, top + height))
        return np.array(image.resize(shape[::-1], Image.Resampling.BILINEAR))


def to_float(pixels: Tensor) -> Tensor:
    """Turn uint8 or uint16 into float32 in -1..1, both ends exact; floats become float32 and keep their values.

    8-bit values are first widened to 16 bits, and the scale is a product (a quotient rounds differently on CUDA), so
    that the result depends neither on the stored depth nor on the device.
    """
    if pixels.is_floating_point():
        return pixels.to(torch.float32)
    if pixels.dtype == torch.uint8:
        wide = pixels.to(torch.int32) * 257
    else:
        # int16 has every operation on every device, uint16 has few.
        wide = pixels.view(torch.int16).to(torch.int32) & 0xFFFF
    return (wide.to(torch.float32) - 32767.5) * (1 / 32767.5)


def value_range(images: Tensor, name: str = "images") -> tuple[float, float]:
    """Return the least and greatest value of float images, which must lie in -1..1.

    Raises:
        InputError: a value outside -1..1 by more than 0.001; the message has the observed range and the remedy.
        NonFiniteError: a NaN or infinite value.
    """
    if not images.numel():
        return 0.0, 0.0
    low, high = (float(value) for value in torch.stack(images.aminmax()).tolist())
    if not np.isfinite((low, high)).all():
        raise NonFiniteError(f"{name} must be finite, got NaN or infinite pixels")
    if low < -1 - TOLERANCE or high > 1 + TOLERANCE:
        remedy = "use images / 127.5 - 1" if low >= 0 and high <= 255 else "simsid.data.read maps raw gray values"
        raise InputError(f"{name} must lie in -1..1, from black to white, got {low:g} to {high:g}; {remedy}")
    return low, high


def _range(image: DecodedImage, intensity: str) -> tuple[float, float]:
    """Return the gray values that become black and white."""
    if intensity == "minmax":
        return extremes(image)
    if intensity == "range" or image.for_display:
        if image.declared is None:
            raise ReadError(f"{image.bits}-bit samples declare no range; use intensity 'auto' or 'minmax'")
        return image.declared
    # The only copy of all pixels: the percentiles reorder it.
    measured = pixels_inside(image)
    low, high = (float(value) for value in np.percentile(measured, (CLIPPED, 100 - CLIPPED), overwrite_input=True))
    return (low, high) if high > low else extremes(image)  # nearly all pixels are equal


def _normalized(image: DecodedImage, band: slice, low: float, high: float) -> np.ndarray:
    """Map some rows of gray values to float32 in 0..1."""
    values = image.pixels[band].astype(np.float32)
    if high <= low:
        return np.zeros_like(values)
    # float32 holds 16-bit differences exactly, so the order of gray values survives.
    values -= np.float32(low)
    values /= np.float32(high - low)
    np.clip(values, 0, 1, out=values)
    if image.padding is not None:
        values[image.padding[band]] = 0
    return values


def _resize(image: DecodedImage, limits: tuple[float, float], size: tuple[int, int], aspect: str) -> np.ndarray:
    """Normalize and resize to float32 `[H, W]`; Pillow's bilinear filter is antialiased when it shrinks."""
    rows, columns = image.pixels.shape
    height, width = size
    left, top, right, bottom = 0.0, 0.0, float(columns), float(rows)
    if aspect == "pad":
        down, across, height, width = _padded_window((rows, columns), size)
    elif aspect == "crop":
        left, top, right, bottom = _cropped_box((rows, columns), size)
    if rows * columns <= AT_ONCE:
        source = Image.fromarray(_normalized(image, slice(None), *limits))
    else:
        # Filter the rows of one band after the other, without a second image of full size. Filtering the columns first,
        # as Pillow does where that is faster, rounds differently.
        narrow = np.empty((rows, width), np.float32)
        for band in bands(rows, columns):
            strip = Image.fromarray(_normalized(image, band, *limits))
            box = (left, 0.0, right, float(strip.height))
            narrow[band] = np.asarray(strip.resize((width, strip.height), Image.Resampling.BILINEAR, box=box))
        source, left, right = Image.fromarray(narrow), 0.0, float(width)
    box = (left, top, right, bottom)
    resized = np.asarray(source.resize((width, height), Image.Resampling.BILINEAR, box=box))
    if aspect != "pad":
        return resized
    padded = np.zeros(size, np.float32)
    padded[down : down + height, across : across + width] = resized
    return padded


def _padded_window(shape: tuple[int, ...], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return where an image of `shape` lies in the padded one of `size`: top, left, height, width in pixels."""
    (rows, columns), (height, width) = shape, size
    scale = min(height / rows, width / columns)
    inner = max(1, round(rows * scale)), max(1, round(columns * scale))
    return (height - inner[0]) // 2, (width - inner[1]) // 2, *inner


def _cropped_box(shape: tuple[int, ...], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the part of an image of `shape` that is cropped to `size`: left, top, right, bottom in its pixels."""
    (rows, columns), (height, width) = shape, size
    scale = max(height / rows, width / columns)
    across, down = width / scale, height / scale
    left, top = (columns - across) / 2, (rows - down) / 2
    # Rounding may pass the border by 1e-13, which Pillow refuses.
    return max(left, 0.0), max(top, 0.0), min(left + across, columns), min(top + down, rows)


def _uncropped(image: Image.Image, shape: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Put an image of `size` back where `_cropped_box` cut it from one of `shape`: float32, NaN around it."""
    left, top, right, bottom = _cropped_box(shape, size)
    begin, end, low, high = _uncropped_axis(left, right, size[1])
    first, last, upper, lower = _uncropped_axis(top, bottom, size[0])
    restored = np.full(shape, np.nan, np.float32)
    restored[first:last, begin:end] = np.asarray(
        image.resize((end - begin, last - first), Image.Resampling.BILINEAR, box=(low, upper, high, lower))
    )
    return restored


def _uncropped_axis(low: float, high: float, side: int) -> tuple[int, int, float, float]:
    """Return the pixels `[first, last)` whose centers lie in `low..high`, and their edges on the axis `0..side`."""
    first = math.ceil(low - 0.5)
    last = max(math.floor(high - 0.5), first) + 1
    scale = side / (high - low)
    # The edges may lie half a pixel outside, where there is nothing to interpolate.
    return first, last, max((first - low) * scale, 0.0), min((last - low) * scale, float(side))

"""The images a report shows, and their pictures: input, reconstruction, heat map over the input, color bar."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from simsid.errors import InputError
from simsid.scoring.overlay import colors, gray, overlay, upper_limit


@dataclass(frozen=True, eq=False)
class HeatMap:
    """A map of where an image is anomalous.

    Args:
        name: the signal it belongs to.
        values: `[H, W]`, 0 and more; NaN counts as 0.
        unit: of the values, such as `"squared difference of intensities in -1..1"`.
        limit: the value at the bright end of the color bar; None: the 99.5 % quantile of this map.
    """

    name: str
    values: np.ndarray
    unit: str = ""
    limit: float | None = None


@dataclass(frozen=True, eq=False)
class Example:
    """One image to show.

    Args:
        path: its file.
        finding: its kind (`"NORMAL"`, `"missing"`, ...).
        label: 0 normal, 1 abnormal, None unknown.
        score: the model's score, higher = more anomalous.
        input: `[H, W]` in -1..1.
        reconstruction: `[H, W]` in -1..1, or None where the model reconstructs nothing.
        heat_map: `[H, W]`, 0 and more, or None where the model has no map; all maps of a page share one color scale,
            so they must have one unit.
        heat_name: the signal that the map belongs to; `""` shows it as `heat map`.
        maps: every map of the model by signal, `[H, W]` each, for the image's own page.
        details: name to value of how the file was read (size, bit depth, window, polarity, ...).

    Raises:
        InputError: the pictures differ in shape or do not have two axes.
    """

    path: str
    finding: str
    label: int | None
    score: float
    input: np.ndarray
    reconstruction: np.ndarray | None = None
    heat_map: np.ndarray | None = None
    heat_name: str = ""
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)
    details: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {name: list(np.shape(picture)) for name, picture in self.pictures.items()}
        first = shapes["input"]
        if len(first) != 2 or any(shape != first for shape in shapes.values()):
            raise InputError(f"input, reconstruction and heat_map must share one shape [H, W], got {shapes}")

    @property
    def pictures(self) -> dict[str, np.ndarray]:
        """The pictures that exist by name, `[H, W]` each: input, reconstruction, heat_map."""
        pictures = {"input": self.input, "reconstruction": self.reconstruction, "heat_map": self.heat_map}
        return {name: picture for name, picture in pictures.items() if picture is not None}


def label_name(label: int | None) -> str:
    """Return the word for a label: normal, abnormal or unlabelled."""
    return {0: "normal", 1: "abnormal"}.get(label, "unlabelled") if label is not None else "unlabelled"


def heat_limit(examples: Sequence[Example]) -> float:
    """Return the value at the bright end of the color scale that the heat maps of all examples share."""
    maps = [np.ravel(example.heat_map) for example in examples if example.heat_map is not None]
    return upper_limit(np.concatenate(maps or [np.zeros(0)]))


def map_limit(heat: HeatMap) -> float:
    """Return the value at the bright end of one map's color scale."""
    return upper_limit(heat.values) if heat.limit is None else heat.limit


def pictures(example: Example, limit: float) -> list[tuple[str, np.ndarray]]:
    """Return name and pixels of an example's pictures: `[H, W]` gray or `[H, W, 3]` for the overlay, uint8."""
    shown = [("input", gray(example.input))]
    if example.reconstruction is not None:
        shown.append(("reconstruction", gray(example.reconstruction)))
    if example.heat_map is not None:
        shown.append((example.heat_name or "heat map", overlay(example.input, example.heat_map, limit)))
    return shown


def color_bar() -> bytes:
    """Encode the color scale as a PNG of 256 x 1 pixels, from 0 at the left to the limit at the right."""
    return encode(colors(np.linspace(0.0, 1.0, 256))[None])


def encode(pixels: np.ndarray, limit: int = 384) -> bytes:
    """Encode `[H, W]` or `[H, W, 3]` uint8 as PNG, reduced to `limit` pixels a side: a page must fit in a mail."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((limit, limit))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

"""The one table of anomaly signals, which configuration, command line, reports and frozen models read.

A signal is computed from what a model's forward pass gives of a batch, a mapping of names to values that each model
class documents. A model has every signal whose `needs` it provides. To add a signal, add an entry to `SIGNALS`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from simsid.errors import InputError, InputTypeError

Outputs = Mapping[str, Any]
"""What a model computed of a batch, by name; `images` `[B, 1, H, W]` is always there."""

CELLS = 16
"""Rows and columns of the cells whose errors `standardized_residual` compares with those of normal images."""

POOL = 8
"""Side in pixels of the squares whose mean error `local_residual` and `focal_residual` compare."""


@dataclass(frozen=True)
class Signal:
    """One way to measure how anomalous an image is; a higher value is more anomalous.

    Args:
        name: its only name: in `Config(signal=...)`, options, tables and files.
        description: one clause for reports and help texts.
        needs: the entries of a model's outputs that `compute` and `map` read.
        compute: outputs to `[B]`, one value an image.
        map: outputs to `[B, h, w]`, where in the image the signal comes from; None where it has no map.
        unit: the unit of the map's values, for the color bar.
        localizes: whether the map's peak lies on planted anomalies; reports prefer such maps. Grad-CAM's does not.
        locations: outputs to `[B, L]`, the values that the calibration standardizes at each location; None for a signal
            without such values.
    """

    name: str
    description: str
    needs: tuple[str, ...]
    compute: Callable[[Outputs], Tensor]
    map: Callable[[Outputs], Tensor] | None = None
    unit: str = ""
    localizes: bool = True
    locations: Callable[[Outputs], Tensor] | None = None


def residual(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the mean squared reconstruction error of each image: `[B, 1, H, W]` twice to `[B]`, float64."""
    return _squared_error(images, reconstruction).flatten(1).mean(1)


def local_residual(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the largest squared error after 8 x 8 average pooling: `[B, 1, H, W]` twice to `[B]`, float64."""
    return _pooled_error(images, reconstruction).amax(1)


def focal_residual(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the mean over the worst twentieth of 8 x 8 squares: `[B, 1, H, W]` twice to `[B]`, float64.

    It lies between `residual`, which a small anomaly hardly moves, and `local_residual`, which depends on one square.
    """
    squares = _pooled_error(images, reconstruction)
    return squares.topk(-(-squares.shape[1] // 20), dim=1).values.mean(1)


def memory_distance(query: Tensor, retrieved: Tensor) -> Tensor:
    """Return the largest Euclidean distance of a location's query from its look-up: `[B, L, D]` to `[B]`, float64."""
    return (query.double() - retrieved.double()).norm(dim=-1).amax(1)


def residual_map(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the squared error averaged over the 9 x 9 pixels around each: `[B, 1, H, W]` twice to `[B, H, W]`."""
    error = (images.float() - reconstruction.float()).square()
    return F.avg_pool2d(error, 9, stride=1, padding=4, count_include_pad=False)[:, 0]


def memory_distance_map(query: Tensor, retrieved: Tensor) -> Tensor:
    """Return the distance of each location's query from its look-up: `[B, L, D]` to `[B, P, P]`, float32."""
    distance = (query.float() - retrieved.float()).norm(dim=-1)
    side = round(distance.shape[1] ** 0.5)
    return distance.unflatten(1, (side, side))


def cell_residual(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the root mean square error of each of 16 x 16 cells: `[B, 1, H, W]` twice to `[B, 256]`, float64."""
    return F.adaptive_avg_pool2d(_squared_error(images, reconstruction), CELLS).flatten(1).sqrt()


def location_distance(query: Tensor, retrieved: Tensor) -> Tensor:
    """Return the distance of each location's query from its look-up: `[B, L, D]` twice to `[B, L]`, float64."""
    return (query.double() - retrieved.double()).norm(dim=-1)


def _squared_error(images: Tensor, reconstruction: Tensor) -> Tensor:
    return (images.double() - reconstruction.double()).square()


def _pooled_error(images: Tensor, reconstruction: Tensor) -> Tensor:
    error = _squared_error(images, reconstruction)
    return F.avg_pool2d(error, POOL, ceil_mode=True, count_include_pad=False).flatten(1)


def _of_reconstruction(measure: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Outputs], Tensor]:
    return lambda outputs: measure(outputs["images"], outputs["reconstruction"])


def _of_memory(measure: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Outputs], Tensor]:
    return lambda outputs: measure(outputs["query"], outputs["retrieved"])


_GRAY_UNIT = "squared difference of gray values in -1..1"
_DISTANCE_UNIT = "Euclidean distance of features"
_LOGIT_UNIT = "Grad-CAM, contribution to the negated logit"
_RESIDUAL_MAP: dict[str, Any] = {
    "map": _of_reconstruction(residual_map),
    "unit": _GRAY_UNIT,
}


def _of_locations(name: str, description: str, *, localizes: bool = True) -> Signal:
    """Return the signal of a baseline on features, which has a distance for each location."""
    entries = (name, f"{name}_map")
    value, where = (lambda outputs: outputs[name]), (lambda outputs: outputs[f"{name}_map"])
    return Signal(name, description, entries, value, where, "distance of features", localizes)


def _standardized(
    name: str, description: str, needs: tuple[str, ...], locations: Callable[[Outputs], Tensor], **of_map: Any
) -> Signal:
    """Return a signal that compares each location's value with those of normal images at the same location.

        score = mean over locations of ((value - mu) / sigma)^2

    mu and sigma, `[L]`, are the calibration's, which a network puts into its outputs; before a calibration 0 and 1.
    """
    return Signal(
        name, description, needs, lambda outputs: _deviations(name, outputs).mean(1), locations=locations, **of_map
    )


def _deviations(name: str, outputs: Outputs) -> Tensor:
    """Return the squared deviation of each location, `[B, L]` float64, of a standardized signal."""
    values = SIGNALS[name].locations(outputs)  # type: ignore[misc]  # a standardized signal has them
    mean, std = outputs.get("location_units", {}).get(name, (0.0, 1.0))
    return ((values - mean) / std).square()


def _inpainting_map(outputs: Outputs) -> Tensor:
    return outputs["inpainting_map"]


_INPAINTING_UNIT = "root mean square error of the prediction, 1 for a normal image"

SIGNALS: dict[str, Signal] = {
    signal.name: signal
    for signal in (
        Signal(
            "discriminator_per_image",
            "the papers' score, the negated logit of the discriminator on the reconstruction, normalized with each "
            "image's own statistics as in the released evaluation",
            ("reconstruction", "discriminator"),
            lambda outputs: -outputs["discriminator"](outputs["reconstruction"], "per_image"),
            map=lambda outputs: outputs["discriminator"].grad_cam(outputs["reconstruction"], "per_image"),
            unit=_LOGIT_UNIT,
            localizes=False,
        ),
        Signal(
            "discriminator_running",
            "the papers' score, normalized with the running statistics of training",
            ("reconstruction", "discriminator"),
            lambda outputs: -outputs["discriminator"](outputs["reconstruction"]),
            map=lambda outputs: outputs["discriminator"].grad_cam(outputs["reconstruction"]),
            unit=_LOGIT_UNIT,
            localizes=False,
        ),
        Signal(
            "residual",
            "mean squared difference between input and reconstruction",
            ("reconstruction",),
            _of_reconstruction(residual),
            **_RESIDUAL_MAP,
        ),
        Signal(
            "local_residual",
            "largest difference between input and reconstruction after 8 x 8 average pooling",
            ("reconstruction",),
            _of_reconstruction(local_residual),
            **_RESIDUAL_MAP,
        ),
        Signal(
            "focal_residual",
            "mean difference between input and reconstruction over the worst twentieth of 8 x 8 squares",
            ("reconstruction",),
            _of_reconstruction(focal_residual),
            **_RESIDUAL_MAP,
        ),
        Signal(
            "memory_distance",
            "largest distance over locations of the in-painting block's query from what its memory returns",
            ("query", "retrieved"),
            _of_memory(memory_distance),
            map=_of_memory(memory_distance_map),
            unit=_DISTANCE_UNIT,
            localizes=False,
        ),
        _standardized(
            "standardized_residual",
            "difference between input and reconstruction in 16 x 16 cells, in deviations of normal images at each cell",
            ("reconstruction",),
            _of_reconstruction(cell_residual),
            map=lambda outputs: _deviations("standardized_residual", outputs).unflatten(1, (CELLS, CELLS)),
            unit="squared deviations of normal images",
        ),
        _standardized(
            "standardized_memory_distance",
            "distance of the in-painting block's query from its look-up, in deviations of normal images there",
            ("query", "retrieved"),
            _of_memory(location_distance),
        ),
        Signal(
            "pixel_knn",
            "mean distance in pixels to the nearest normal training images",
            ("pixel_knn_distance",),
            lambda outputs: outputs["pixel_knn_distance"],
        ),
        Signal(
            "pixel_pca",
            "squared error of rebuilding the pixels from the principal components of normal images",
            ("pixel_pca_error",),
            lambda outputs: outputs["pixel_pca_error"].mean((1, 2)),
            map=lambda outputs: outputs["pixel_pca_error"],
            unit=_GRAY_UNIT,
        ),
        Signal(
            "pixel_isolation_forest",
            "how few random splits of single pixels separate the image from normal training images",
            ("pixel_isolation_forest",),
            lambda outputs: outputs["pixel_isolation_forest"],
        ),
        Signal(
            "pooled_memory",
            "distance of the image's mean features to the nearest normal ones, in deviations of normal images",
            ("pooled_memory",),
            lambda outputs: outputs["pooled_memory"],
        ),
        Signal(
            "inpainting",
            "error of predicting the features of each location from its neighbors' memory look-ups, in deviations of "
            "normal images",
            ("inpainting", "inpainting_map"),
            lambda outputs: outputs["inpainting"],
            map=_inpainting_map,
            unit=_INPAINTING_UNIT,
        ),
        Signal(
            "synthetic",
            "logit of a linear classifier of features against painted opacities, in deviations of normal images",
            ("synthetic",),
            lambda outputs: outputs["synthetic"],
        ),
        Signal(
            "combined",
            "weighted sum of the feature memory's other signals; its map is the in-painting's",
            ("combined", "inpainting_map"),
            lambda outputs: outputs["combined"],
            map=_inpainting_map,
            unit=_INPAINTING_UNIT,
        ),
        Signal(
            "feature_knn",
            "mean distance of pooled features to the nearest normal training images",
            ("feature_knn",),
            lambda outputs: outputs["feature_knn"],
        ),
        _of_locations("location_knn", "distance of each location's features to the nearest normal ones there"),
        _of_locations("padim", "Mahalanobis distance of each location's features from the normal distribution there"),
        _of_locations(
            "patchcore", "largest distance of a location's features from a coreset of normal ones", localizes=False
        ),
    )
}


@dataclass(frozen=True)
class Map:
    """A map that `maps` draws: that of a signal, or one that belongs to no signal.

    Args:
        description: what is shown; of a signal, what the signal measures.
        compute, unit, localizes: as `Signal.map`, `unit` and `localizes`.
    """

    description: str
    compute: Callable[[Outputs], Tensor]
    unit: str
    localizes: bool


def decoder_memory_map(level: int) -> str:
    """Return the name of the map of the memory after the decoder's up block `level`, 1 for the deepest."""
    return f"decoder_memory_{level}"


def _of_decoder(level: int) -> Map:
    """Return the map of one decoder memory; `outputs` hold the memory, its queries and what it returned."""

    def compute(outputs: Outputs) -> Tensor:
        memory, before, after = outputs[decoder_memory_map(level)]
        return memory.distance(before, after)

    what = f"distance of each patch's features after up block {level} of the decoder from what the memory returns"
    return Map(what, compute, _DISTANCE_UNIT, localizes=False)


DECODER_LEVELS = 12
"""Up blocks that a decoder has at most: an image of 2^12 pixels a side can be halved so often."""

MAPS: dict[str, Map] = {
    **{
        signal.name: Map(signal.description, signal.map, signal.unit, signal.localizes)
        for signal in SIGNALS.values()
        if signal.map is not None
    },
    **{decoder_memory_map(level): _of_decoder(level) for level in range(1, DECODER_LEVELS + 1)},
}
"""Every map: those of signals, by the signal's name, and those of the decoder's memories."""


def available_signals(provided: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the signals that outputs with the entries `provided` allow, in the order of the table."""
    provided = {"images", *provided}
    return tuple(name for name, signal in SIGNALS.items() if provided.issuperset(signal.needs))


def check_signals(names: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    """Return `names` as a tuple; raise `InputError` for a name that is not among `known`."""
    if not isinstance(names, Iterable):
        raise InputTypeError(f"signal must be one of {', '.join(known)}, got {names!r}")
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in known:
            signal = SIGNALS.get(name) if isinstance(name, str) else None
            # The model computes what the signal needs, and its calibration, of an older version, lacks the deviations.
            lacking = signal and signal.locations and any(SIGNALS[other].needs == signal.needs for other in known)
            hint = ", which needs a new calibration: simsid calibrate MODEL DATA -o NEW" if lacking else ""
            raise InputError(f"signal must be one of {', '.join(known)}, got {name!r}{hint}")
    return names


def upsampled(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge maps `[B, h, w]` bilinearly to `[B, *size]`, float32; maps of that size stay as they are."""
    values = values.to(torch.float32)
    if tuple(values.shape[1:]) == size:
        return values
    return F.interpolate(values[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]

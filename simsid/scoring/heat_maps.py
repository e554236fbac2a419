"""Writes where each file of a stream is anomalous, at the file's own size: a float map and a picture."""

import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from simsid import checkpoint
from simsid.data import Failure, Preprocessing, Record, read_image
from simsid.data.files import FileReader, open_file
from simsid.data.preprocessing import to_float
from simsid.errors import InputError, ReadError
from simsid.models.base import AnomalyModel
from simsid.models.scorer import BATCH
from simsid.models.signals import MAPS
from simsid.parallel import in_order, thread_count
from simsid.scoring.overlay import overlay, upper_limit, with_color_bar

# Files that wait for a full batch: a folder of broken files must not look stuck.
WAITING_AT_MOST = 256


@dataclass(frozen=True)
class Explained:
    """What was written of one file.

    Args:
        path: the file.
        overlay: name of the picture in the output folder, `""` where there is none.
        map: name of the float map in the output folder, `[H, W]` float32 of the file's own size.
        height, width: of the file in pixels, upright.
        peak: the largest value of the map.
        peak_row, peak_column: where it is, in pixels of the file.
        reason: why there is no map; `""` where there is one.
    """

    path: str
    overlay: str = ""
    map: str = ""
    height: int | None = None
    width: int | None = None
    peak: float | None = None
    peak_row: int | None = None
    peak_column: int | None = None
    reason: str = ""


def explain_files(
    model: AnomalyModel,
    files: Iterable[Record | str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    signal: str | None = None,
    limit: float | None = None,
    workers: int | None = None,
) -> Iterator[Explained]:
    """Write the heat map of every file in bounded memory, and yield one result for each, in their order.

    A file `scan.png` gives `scan-<12 hex digits of its path's SHA-256>.npy`, the map at the file's own size, and the
    same name with `.png`: the map over the dimmed image at its own size, and a color bar below. Nothing else in
    `folder` is touched, and a file of that name is replaced atomically.

    Args:
        model: any model.
        files: records or paths.
        folder: where to write; it must exist.
        signal: whose map; None is the model's own signal where it has a map, else the first that has.
        limit: the value at the bright end of every color bar; None: the 99.5 % quantile of each map.
        workers: threads that decode and write; None is one per core.

    Raises:
        InputError: at the call, a signal without a map or a limit that is not positive.
        OSError: the folder cannot be written to; never for a file that cannot be read.
    """
    name = model.choose_map(signal)
    if limit is not None and not 0.0 < limit < float("inf"):
        raise InputError(f"limit must be a positive number, got {limit}")
    write = functools.partial(_write, pathlib.Path(folder), model.preprocessing, name, limit)
    records = (file if isinstance(file, Record) else Record(os.fspath(file)) for file in files)
    return _explained(model, records, name, write, thread_count(workers))


def file_name(path: str) -> str:
    """Return the name of a file's results without extension: equal for equal paths only, safe on every system."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", pathlib.PurePath(path).stem)[:40].strip("-") or "image"
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{readable}-{digest}"


Write = functools.partial[Explained]
Waiting = list[tuple[Record, np.ndarray | Failure]]


def _explained(
    model: AnomalyModel, records: Iterable[Record], name: str, write: Write, workers: int
) -> Iterator[Explained]:
    frozen, reader = model.freeze(), FileReader(model.preprocessing)
    waiting: Waiting = []
    ready = 0

    def flush() -> Iterator[Explained]:
        pixels = [result for _, result in waiting if isinstance(result, np.ndarray)]
        if pixels:
            images = torch.stack([to_float(torch.from_numpy(image)) for image in pixels])[:, None]
            maps = iter(frozen.maps(images, name).numpy())
        items = [(record, result if isinstance(result, Failure) else next(maps)) for record, result in waiting]
        for _, explained in in_order(lambda item: write(*item), items, workers):
            yield explained

    for record, result in in_order(reader, records, workers, BATCH):
        waiting.append((record, result if isinstance(result, Failure) else result.pixels))
        ready += not isinstance(result, Failure)
        if ready == BATCH or len(waiting) == WAITING_AT_MOST:
            yield from flush()
            waiting, ready = [], 0
    yield from flush()


def _write(
    folder: pathlib.Path,
    preprocessing: Preprocessing,
    name: str,
    limit: float | None,
    record: Record,
    result: np.ndarray | Failure,
) -> Explained:
    """Write map and picture of one file, `result` being the map at the model's size."""
    if isinstance(result, Failure):
        return Explained(record.path, reason=result.reason)
    if not np.isfinite(result).all():
        return Explained(record.path, reason=f"the map of {name} holds NaN or infinite values")
    # Decoded a second time: holding a batch at full size would take gigabytes.
    try:
        with open_file(record.path) as file:
            image = preprocessing.gray(read_image(file))
    except ReadError as error:
        return Explained(record.path, reason=str(error))
    height, width = image.shape
    heat = preprocessing.at_own_size(result, (height, width))
    bright = upper_limit(result) if limit is None else limit
    unit = MAPS[name].unit
    picture = with_color_bar(overlay(image, heat, bright), bright, f"{name}: {unit}" if unit else name)
    base = file_name(record.path)
    _save_array(folder / f"{base}.npy", heat)
    _save_picture(folder / f"{base}.png", picture)
    row, column = np.unravel_index(int(np.nanargmax(heat)), heat.shape)
    peak = float(heat[row, column])
    return Explained(record.path, f"{base}.png", f"{base}.npy", height, width, peak, int(row), int(column))


def _save_array(path: pathlib.Path, array: np.ndarray) -> None:
    with checkpoint.replaced(path) as temporary, open(temporary, "xb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _save_picture(path: pathlib.Path, pixels: np.ndarray) -> None:
    with checkpoint.replaced(path) as temporary, open(temporary, "xb") as file:
        Image.fromarray(pixels).save(file, "PNG")
        file.flush()
        os.fsync(file.fileno())

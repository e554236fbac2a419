"""Reports what a folder of images holds, and what keeps any of it from being read."""

import os
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simsid.data.datasets import Path, open_dataset
from simsid.data.files import open_file
from simsid.data.folders import is_image, patterns, walk
from simsid.data.reading import MAX_PIXELS, one_sentence, read_image
from simsid.data.records import Failure
from simsid.errors import ReadError, printable
from simsid.parallel import in_order, thread_count, with_progress

# Lines of the text that list sizes, and names of files that are listed.
_SHOWN = 10


@dataclass(frozen=True)
class ScanReport:
    """What `scan` found; `print` it, or take `as_dict`.

    Args:
        folder: what was scanned.
        formats: images by format, such as `{"JPEG": 5}`.
        sizes: images by (width, height) in pixels, upright.
        bits: images by the bits of a stored sample.
        without_range: images deeper than 8 bits that declare no display range; see `Preprocessing` on `"auto"`.
        failures: the files, and folders that cannot be listed, each with its reason.
        ignored: files that are not images.
        masks: images of exactly two gray values, which are segmentation masks rather than radiographs.
        for_processing: DICOM images stored FOR PROCESSING, whose gray values are not those meant for display.
    """

    folder: str
    formats: dict[str, int]
    sizes: dict[tuple[int, int], int]
    bits: dict[int, int]
    without_range: int
    failures: tuple[Failure, ...]
    ignored: tuple[str, ...]
    masks: tuple[str, ...] = ()
    for_processing: tuple[str, ...] = ()

    @property
    def readable(self) -> int:
        """Images that can be read."""
        return sum(self.formats.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON: sizes as `"WxH"`, bits as text."""
        return {
            "folder": self.folder,
            "readable": self.readable,
            "rejected": len(self.failures),
            "formats": self.formats,
            "sizes": {f"{width}x{height}": count for (width, height), count in self.sizes.items()},
            "bits": {str(bits): count for bits, count in self.bits.items()},
            "without_range": self.without_range,
            "failures": [{"path": failure.path, "reason": failure.reason} for failure in self.failures],
            "ignored": list(self.ignored),
            "masks": list(self.masks),
            "for_processing": list(self.for_processing),
        }

    def __str__(self) -> str:
        lines = [f"{printable(self.folder)}: {self.readable} readable images, {len(self.failures)} rejected"]
        lines += _table("format", self.formats)
        lines += _table("bits", {str(bits): count for bits, count in self.bits.items()})
        lines += _table("size", {f"{width} x {height}": count for (width, height), count in self.sizes.items()})
        if self.without_range:
            lines.append(
                f"{self.without_range} deeper than 8 bits without a display range: "
                "their own 0.1 and 99.9 percentiles become black and white"
            )
        if self.failures:
            lines.append("rejected:")
            lines += [f"  {self._inside(failure.path)}: {failure.reason}" for failure in self.failures]
        lines += self._listed("two gray values only, probably masks (leave them out with exclude)", self.masks)
        lines += self._listed("stored FOR PROCESSING, not for display", self.for_processing)
        lines += self._listed("not images, ignored", self.ignored)
        return "\n".join(lines)

    def _listed(self, what: str, paths: Sequence[str]) -> list[str]:
        more = len(paths) - _SHOWN
        names = ", ".join(self._inside(path) for path in paths[:_SHOWN])
        return [f"{what}: {names}" + (f" and {more} more" if more > 0 else "")] if paths else []

    def _inside(self, path: str) -> str:
        return printable(os.path.relpath(path, self.folder) if os.path.isdir(self.folder) else path)


def scan(
    folder: Path,
    *,
    exclude: str | Sequence[str] = (),
    workers: int | None = None,
    progress: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> ScanReport:
    """Read every image of a folder (or of a CSV list) in full, and count.

    Files with an image's extension or an image's first bytes are read; all others are listed as ignored. Hidden files,
    `__MACOSX` and `DICOMDIR` are skipped. A folder below that cannot be listed is a failure.

    Args:
        exclude: shell patterns of paths to leave out; see `Radiographs`.
        workers, progress, max_pixels: see `load_images`.

    Raises:
        InputError: the path is neither a folder nor a list nor an image.
        OSError: the folder cannot be listed.
    """
    folder = os.path.abspath(os.fspath(folder))
    if os.path.isdir(folder):
        files = list(walk(folder, patterns(exclude)))
        images = [path for path in files if is_image(path) or os.path.isdir(path)]
        ignored = tuple(sorted(set(files) - set(images)))
    else:
        images = [record.path for record in open_dataset(folder, exclude=exclude).records]
        ignored = ()
    results: Iterable[tuple[str, _Facts | Failure]]
    results = in_order(lambda path: _facts(path, max_pixels), images, thread_count(workers))
    if progress:
        results = with_progress(results, len(images), "scanning")
    good: dict[str, _Facts] = {}
    failures: list[Failure] = []
    for path, result in results:
        if isinstance(result, Failure):
            failures.append(result)
        else:
            good[path] = result
    return ScanReport(
        folder=folder,
        formats=_counted(facts.format for facts in good.values()),
        sizes=_counted(facts.size for facts in good.values()),
        bits=_counted(facts.bits for facts in good.values()),
        without_range=sum(not facts.for_display for facts in good.values()),
        failures=tuple(failures),
        ignored=ignored,
        masks=tuple(path for path, facts in good.items() if facts.two_valued),
        for_processing=tuple(path for path, facts in good.items() if facts.for_processing),
    )


@dataclass(frozen=True)
class _Facts:
    format: str
    size: tuple[int, int]
    bits: int
    for_display: bool
    two_valued: bool
    for_processing: bool


def _facts(path: str, max_pixels: int) -> _Facts | Failure:
    try:
        with open_file(path) as file:
            image = read_image(file, max_pixels=max_pixels)
    except ReadError as error:
        return Failure(path, str(error))
    except Exception as error:  # a scan exists to name the files that break things
        return Failure(path, f"the image cannot be read: {one_sentence(error)}")
    rows, columns = image.pixels.shape
    low, high = image.pixels.min(), image.pixels.max()
    return _Facts(
        image.format,
        (columns, rows),
        image.bits,
        image.for_display,
        two_valued=bool(low < high and np.isin(image.pixels, (low, high)).all()),
        for_processing=bool(getattr(image, "for_processing", False)),
    )


def _counted(values: Iterable[Hashable]) -> dict[Any, int]:
    """Count values, the most frequent first and equally frequent ones in their own order."""
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))


def _table(title: str, counts: dict[str, int]) -> list[str]:
    width = max((len(name) for name in counts), default=0)
    lines = [f"{title}:"] if counts else []
    lines += [f"  {name:<{width}}  {count}" for name, count in list(counts.items())[:_SHOWN]]
    if len(counts) > _SHOWN:
        lines.append(f"  and {len(counts) - _SHOWN} more")
    return lines

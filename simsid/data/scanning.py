"""Says what a folder of images holds and what keeps any of it from being read."""

import os
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from simsid.data.datasets import Path, open_dataset
from simsid.data.folders import is_image, walk
from simsid.data.reading import MAX_PIXELS, one_sentence, read_image
from simsid.data.records import Failure
from simsid.errors import ReadError
from simsid.parallel import in_order, thread_count, with_progress

# Lines of the text that list sizes, and files that are no images.
_SHOWN = 10


@dataclass(frozen=True)
class ScanReport:
    """What `scan` found; ``print`` it, or take `as_dict`.

    Arguments:
        folder: what was scanned.
        formats: images by format, such as ``{"JPEG": 5}``.
        sizes: images by (width, height) in pixels, upright.
        bits: images by the bits of a stored sample.
        without_range: images deeper than 8 bits that say no display range; see `load_images` on ``"auto"``.
        failures: the files that cannot be read, each with its reason.
        ignored: files that are no images.
    """

    folder: str
    formats: dict[str, int]
    sizes: dict[tuple[int, int], int]
    bits: dict[int, int]
    without_range: int
    failures: tuple[Failure, ...]
    ignored: tuple[str, ...]

    @property
    def readable(self) -> int:
        """Images that can be read."""
        return sum(self.formats.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it: sizes as ``"WxH"``, bits as text."""
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
        }

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.readable} readable images, {len(self.failures)} rejected"]
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
        if self.ignored:
            more = len(self.ignored) - _SHOWN
            names = [self._inside(path) for path in self.ignored[:_SHOWN]]
            lines.append(f"not images, ignored: {', '.join(names)}" + (f" and {more} more" if more > 0 else ""))
        return "\n".join(lines)

    def _inside(self, path: str) -> str:
        return os.path.relpath(path, self.folder) if os.path.isdir(self.folder) else path


def scan(
    folder: Path, *, workers: int | None = None, progress: bool = False, max_pixels: int = MAX_PIXELS
) -> ScanReport:
    """Read every image of a folder (or of a CSV list) in full, and count.

    Files with an image's extension or an image's first bytes are read; all others are listed as ignored. Hidden files,
    ``__MACOSX`` and ``DICOMDIR`` are passed over.

    Raises: ValueError where the path is neither; OSError where it cannot be listed.
    """
    folder = os.path.abspath(os.fspath(folder))
    if os.path.isdir(folder):
        files = list(walk(folder))
        images = [path for path in files if is_image(path)]
        ignored = tuple(sorted(set(files) - set(images)))
    else:
        images = [record.path for record in open_dataset(folder).records]
        ignored = ()
    facts = in_order(lambda path: _facts(path, max_pixels), images, thread_count(workers))
    if progress:
        facts = with_progress(facts, len(images), "scanning")
    good: list[_Facts] = []
    failures: list[Failure] = []
    for _, fact in facts:
        if isinstance(fact, Failure):
            failures.append(fact)
        else:
            good.append(fact)
    return ScanReport(
        folder=folder,
        formats=_counted(fact.format for fact in good),
        sizes=_counted(fact.size for fact in good),
        bits=_counted(fact.bits for fact in good),
        without_range=sum(not fact.for_display for fact in good),
        failures=tuple(failures),
        ignored=ignored,
    )


@dataclass(frozen=True)
class _Facts:
    format: str
    size: tuple[int, int]
    bits: int
    for_display: bool


def _facts(path: str, max_pixels: int) -> "_Facts | Failure":
    try:
        image = read_image(path, max_pixels=max_pixels)
    except ReadError as error:
        return Failure(path, str(error))
    except Exception as error:  # a scan exists to name the files that break things
        return Failure(path, f"the image cannot be read: {one_sentence(error)}")
    rows, columns = image.pixels.shape
    return _Facts(image.format, (columns, rows), image.bits, image.for_display)


def _counted(values: Iterable[Hashable]) -> dict[Any, int]:
    """Count, the most frequent first and equal ones in their own order."""
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))


def _table(title: str, counts: dict[str, int]) -> list[str]:
    width = max((len(name) for name in counts), default=0)
    lines = [f"{title}:"] if counts else []
    lines += [f"  {name:<{width}}  {count}" for name, count in list(counts.items())[:_SHOWN]]
    if len(counts) > _SHOWN:
        lines.append(f"  and {len(counts) - _SHOWN} more")
    return lines

"""What one rank scores, the rows it keeps until the merge, and the images of its highest scores."""

import hashlib
import heapq
import io
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np

from simsid import checkpoint
from simsid.data import Record
from simsid.distributed import ProcessGroup
from simsid.scoring.stream import Score

LONGEST_ROW = 1 << 16
"""Bytes of a row; a path has at most 4096, an escaped one six times as many."""


class Shard:
    """This rank's records, every `size`-th, with the number of all records and the hash of their paths."""

    def __init__(self, records: Iterator[Record], group: ProcessGroup) -> None:
        self.passed = 0
        self._records = records
        self._group = group
        self._hash = hashlib.sha256()

    def __iter__(self) -> "Shard":
        return self

    def __next__(self) -> Record:
        for record in self._records:
            mine = self.passed % self._group.size == self._group.rank
            self.passed += 1
            self._hash.update(os.fsencode(record.path) + b"\0")
            if mine:
                return record
        raise StopIteration

    def digest(self) -> str:
        """Return the hash of all paths so far."""
        return self._hash.hexdigest()


class Highest:
    """The `size` scores with the highest value of a signal, in one pass; of equal ones the first."""

    def __init__(self, signal: str, size: int) -> None:
        self.signal, self.size = signal, size
        self._heap: list[tuple[float, int, Score]] = []
        self._count = 0

    def add(self, score: Score) -> None:
        """Take a score if it is among the highest so far, with a copy of its image."""
        if score.reason or not self.size:
            return
        self._count += 1
        key = score.signals[self.signal], -self._count
        if len(self._heap) == self.size and key < self._heap[0][:2]:
            return
        # The image is part of a batch, which it would keep in memory.
        kept = score if score.image is None else replace(score, image=score.image.copy())
        heapq.heappush(self._heap, (*key, kept))
        if len(self._heap) > self.size:
            heapq.heappop(self._heap)

    def ascending(self) -> list[Score]:
        """Return the scores, the highest last."""
        return [score for _, _, score in sorted(self._heap, key=lambda entry: entry[:2])]

    def save(self, path: pathlib.Path) -> None:
        """Write the images atomically, with their paths and provenance as JSON."""
        with_image = [score for score in self.ascending() if score.image is not None]
        content = io.BytesIO()
        about = json.dumps([[score.path, dict(score.provenance)] for score in with_image])
        images: dict[str, Any] = {str(i): score.image for i, score in enumerate(with_image)}
        np.savez(content, about=np.frombuffer(about.encode(), np.uint8), **images)
        checkpoint.write_file(path, content.getvalue())


def read_images(path: pathlib.Path) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    """Read what `Highest.save` wrote: path to image and provenance; nothing where the file is missing or damaged."""
    try:
        with np.load(path) as content:
            about = json.loads(content["about"].tobytes())
            return {name: (content[str(i)], provenance) for i, (name, provenance) in enumerate(about)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_row(rows: BinaryIO, score: Score, names: Iterable[str]) -> None:
    """Write a score as one line of JSON, without its image; `names` are the model's signals."""
    values = [score.signals[name] for name in names] if not score.reason else []
    flagged = None if score.flagged is None else int(score.flagged)
    about = [score.path, score.label, score.finding]
    entry = [*about, score.score, flagged, values, score.reason, int(score.for_processing)]
    rows.write(json.dumps(entry).encode() + b"\n")


def read_row(rows: BinaryIO, names: Iterable[str]) -> Score | None:
    """Read what `write_row` wrote; None at the end, and where a kill or a power failure left an incomplete line."""
    line = rows.readline(LONGEST_ROW)
    if not line.endswith(b"\n"):
        return None
    try:
        path, label, finding, score, flagged, values, reason, raw = json.loads(line)
    except (ValueError, TypeError):
        return None
    signals = dict(zip(names, values)) if not reason else {}
    return Score(path, label, finding, score, None if flagged is None else bool(flagged), signals, reason, bool(raw))

"""Scores whole archives: in shares, one a process, which go on where they were killed and end in one table.

OUT/.scoring.lock                 held for a moment by a rank that starts or ends, and by the one that merges
OUT/.scoring/request.json         what is being scored; without it, nothing in the folder is of use
OUT/.scoring/shard-R-of-N.jsonl   the rows of rank R, which takes the files R, R + N, R + 2N, ... of the list
OUT/.scoring/shard-R-of-N.json    rank R is through: how many files the list has, and their hash
OUT/.scoring/shard-R-of-N.lock    held while rank R runs

Ranks share nothing but this folder. Each walks the whole list, one file at a time; nothing is held for every file.
"""

import contextlib
import hashlib
import heapq
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import torch
from filelock import FileLock, Timeout

from simsid import __version__, checkpoint
from simsid.data import Record, iter_records
from simsid.distributed import ProcessGroup
from simsid.errors import ArchiveError
from simsid.models.model import BATCH, Model
from simsid.scoring import stream as scoring
from simsid.scoring.stream import Score

SYNC_SECONDS = 10
"""How much work a power failure may cost; what a kill of the process costs is one batch."""

LONGEST_ROW = 1 << 16
"""Bytes of a row; a path has at most 4096, an escaped one six times as many."""

_REQUEST = {
    "data": "other data",
    "model": "another model",
    "false_alarm_rate": "another false alarm rate",
    "batch_size": "another batch size",
    "ranks": "another number of processes",
    "device": "another kind of device",
    "version": "another version of simsid",
}


@dataclass(frozen=True)
class Summary:
    """What became of all files; `top` holds the most anomalous, the highest last."""

    scored: int
    alarms: int
    failed: int
    top: list[Score]


class Work:
    """The scoring of an archive into a folder, as one rank takes part in it.

        begin, resume, score, finish; the last rank to finish merges and removes what was written on the way.

    A process may be killed at any moment: the next start goes on from there, no file twice and none left out.

    Args:
        data: a folder, a CSV list or an image, as `simsid.data.iter_records` reads it.
        output: the folder for the results; nothing is written before `begin`.
        superseded: whether the results were replaced since this process started; see `begin`.

    Raises:
        CalibrationError: the model has not been calibrated.
        ValueError: no image, an unreadable list, a rate or batch size out of range.
    """

    def __init__(
        self,
        model: Model,
        data: str | os.PathLike,
        output: str | os.PathLike,
        group: ProcessGroup | None = None,
        *,
        false_alarm_rate: float = 0.05,
        batch_size: int = BATCH,
        workers: int | None = None,
        superseded: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model = model
        self.group = group or ProcessGroup()
        self.output = pathlib.Path(output)
        self.folder = self.output / ".scoring"
        self.total: int | None = None
        """Files of this rank, None where only a walk of the folder could tell."""
        if os.path.isfile(data):
            # A list is read through once before anything is computed: its mistakes should not show up hours later.
            self.total = len(range(self.group.rank, sum(1 for _ in iter_records(data)), self.group.size))
        self._share = _Share(iter_records(data), self.group)
        self._batch_size = batch_size
        # Lazy: the files that `resume` finds done are gone from the share when the first score is asked for.
        self._scores = scoring.score_files(
            model,
            self._share,
            false_alarm_rate=false_alarm_rate,
            batch_size=batch_size,
            workers=workers or self.group.cpu_threads(),
        )
        self._request = {
            "data": os.path.abspath(data),
            "model": _identity(model),
            "false_alarm_rate": false_alarm_rate,
            "batch_size": batch_size,
            "ranks": self.group.size,
            "device": model.device.type,
            "version": __version__,
        }
        self._superseded = superseded
        self._lock = FileLock(self.output / ".scoring.lock")
        self._shard_lock = FileLock(self._file(self.group.rank, "lock"))

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *_: object) -> None:
        self._shard_lock.release()

    def begin(self) -> bool:
        """Take hold of this rank's shard.

        False where there is nothing left to do: all shards were complete, as after a kill in the last moments, and
        another rank was quicker to start and has merged them.

        Raises:
            ArchiveError: another process has the shard, or another request is unfinished.
        """
        try:
            # Other ranks hold it for a moment, or while they merge; one process alone has none to wait for.
            lock = self._lock.acquire(timeout=-1 if self.group.size > 1 else 0)
        except Timeout:
            raise self._in_use() from None
        with lock:
            request = self.folder / "request.json"
            if request.exists():
                self._check_request(checkpoint.read_json(request))
            elif self.group.size > 1 and self._superseded():
                return False
            else:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir()
                checkpoint.write_json(request, self._request)
            try:
                self._shard_lock.acquire(timeout=0)
            except Timeout:
                raise self._in_use() from None
            # Until `resume` has compared the rows with the files that are there now.
            self._file(self.group.rank, "json").unlink(missing_ok=True)
        return True

    def resume(self) -> int:
        """Return how many of this rank's files are done; a row that a kill cut short is removed.

        Raises:
            ArchiveError: the rows are not those of the files that are there now.
        """
        done = 0
        with open(self._file(self.group.rank, "jsonl"), "a+b") as rows:
            whole = rows.seek(0)
            while (row := self._read(rows)) is not None:
                record = next(self._share, None)
                if record is None or record.path != row.path:
                    found = f"{record.path} is found" if record else "the list ends"
                    raise ArchiveError(
                        f"{self._request['data']} has changed since its scoring began: {found} where {row.path} was "
                        f"scored; undo the change and start again, or delete {self.folder} to score everything anew"
                    )
                done, whole = done + 1, rows.tell()
            rows.truncate(whole)
        return done

    def score(self) -> Iterator[Score]:
        """Score the remaining files of this rank and write their rows, in batches."""
        synced = time.monotonic()
        with open(self._file(self.group.rank, "jsonl"), "ab") as rows:
            for count, score in enumerate(self._scores, 1):
                values = [score.signals[name] for name in self.model.signal_names] if not score.reason else []
                alarm = None if score.alarm is None else int(score.alarm)
                rows.write(json.dumps([score.path, score.score, alarm, values, score.reason]).encode() + b"\n")
                if count % self._batch_size == 0:
                    rows.flush()
                    if time.monotonic() - synced > SYNC_SECONDS:
                        os.fsync(rows.fileno())
                        synced = time.monotonic()
                yield score
            rows.flush()
            os.fsync(rows.fileno())

    @contextlib.contextmanager
    def finish(self) -> Iterator[list[int]]:
        """Mark this rank's shard as complete; within, nobody else starts or merges. Yields the ranks still missing.

        Raises:
            ArchiveError: the ranks did not see the same files.
        """
        mark = {"files": self._share.passed, "sha256": self._share.digest()}
        with self._lock.acquire():
            checkpoint.write_json(self._file(self.group.rank, "json"), mark)
            self._shard_lock.release()
            missing = [rank for rank in range(self.group.size) if not self._file(rank, "json").exists()]
            if not missing:
                self._check_marks(mark)
            yield missing

    @property
    def columns(self) -> list[str]:
        """The columns of the rows that `merge` writes."""
        return ["path", "score", "alarm", *self.model.signal_names, "reason"]

    def merge(self, write: Callable[[Iterable[object]], object], pictures: int = 0) -> Summary:
        """Write the rows of all shards in the order of the files; of the `pictures` most anomalous, return the scores.

        Raises:
            ArchiveError: a shard is not as it was when its rank had finished.
        """
        scored, alarms = 0, 0
        top: list[tuple[float, int, Score]] = []
        with contextlib.ExitStack() as stack:
            ranks = range(self.group.size)
            shards = [stack.enter_context(open(self._file(rank, "jsonl"), "rb")) for rank in ranks]
            for place in range(self._share.passed):
                row = self._read(shards[place % len(shards)])
                if row is None:
                    path = self._file(place % len(shards), "jsonl")
                    raise ArchiveError(f"{path} was damaged after it was written; start the same command again")
                values = [row.signals.get(name, "") for name in self.model.signal_names]
                score = "" if row.score is None else row.score
                alarm = "" if row.alarm is None else int(row.alarm)
                write([row.path, score, alarm, *values, row.reason])
                if not row.reason:
                    scored, alarms = scored + 1, alarms + bool(row.alarm)
                    heapq.heappush(top, (row.signals[self.model.signal], -place, row))
                    if len(top) > pictures:
                        heapq.heappop(top)
        return Summary(scored, alarms, self._share.passed - scored, [row for _, _, row in sorted(top)])

    def remove(self) -> None:
        """Remove what was written on the way; the results are in their place."""
        # A power failure must not undo the renaming of the results and keep this.
        checkpoint.sync_folder(self.output)
        # First what gives the rest its meaning. The rest does no harm, so failing to remove it is no failure.
        (self.folder / "request.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, rank: int, ending: str) -> pathlib.Path:
        return self.folder / f"shard-{rank}-of-{self.group.size}.{ending}"

    def _in_use(self) -> ArchiveError:
        who = f" as rank {self.group.rank} of {self.group.size}" if self.group.size > 1 else ""
        return ArchiveError(f"{self.output} is in use by another process that scores into it{who}")

    def _check_request(self, found: dict[str, object]) -> None:
        other = [text for name, text in _REQUEST.items() if found.get(name) != self._request[name]]
        if other:
            raise ArchiveError(
                f"{self.output} holds an unfinished scoring of {found.get('data')}, begun with {', '.join(other)} (see "
                f"{self.folder / 'request.json'}); give the same again to finish it, choose another folder with -o, or "
                f"delete {self.folder}"
            )

    def _check_marks(self, mine: dict[str, object]) -> None:
        """Refuse to merge shards of different lists; the next start then brings the others up to date."""
        other = [rank for rank in range(self.group.size) if checkpoint.read_json(self._file(rank, "json")) != mine]
        for rank in other:
            self._file(rank, "json").unlink()
        if other:
            raise ArchiveError(
                f"{self._request['data']} changed while it was scored: ranks {', '.join(map(str, other))} saw other "
                f"files than rank {self.group.rank}; start the same command again"
            )

    def _read(self, rows: BinaryIO) -> Score | None:
        """Read a row, or None at the end and where a kill or a power failure left something else."""
        line = rows.readline(LONGEST_ROW)
        if not line.endswith(b"\n"):
            return None
        try:
            path, score, alarm, values, reason = json.loads(line)
        except (ValueError, TypeError):
            return None
        names = self.model.signal_names if not reason else ()
        return Score(path, reason, score, None if alarm is None else bool(alarm), dict(zip(names, values)))


class _Share:
    """Every `count`-th record, and what passed by altogether: how many files, and the hash of their paths."""

    def __init__(self, records: Iterator[Record], group: ProcessGroup) -> None:
        self.passed = 0
        self._records = records
        self._group = group
        self._hash = hashlib.sha256()

    def __iter__(self) -> "_Share":
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
        """Return the hash of all paths that passed by."""
        return self._hash.hexdigest()


def _identity(model: Model) -> str:
    """Hash all that decides a score."""
    # Of what was loaded, and not of its file, which a training run may have replaced since.
    about = [model.config.to_dict(), model.calibrated().to_dict()]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        # The layout too: libraries sum in another order for another one.
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {tensor.stride()}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

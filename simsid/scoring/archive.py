"""Scores whole archives: in one shard per process, resumed after a kill, merged into one table.

OUT/.scoring.lock                 held briefly by a rank that starts or ends, and by the one that merges
OUT/.scoring/request.json         what is being scored; without it, the folder's content is ignored
OUT/.scoring/shard-R-of-N.jsonl   the rows of rank R, which scores the files R, R + N, R + 2N, ... of the list
OUT/.scoring/shard-R-of-N.npz     the images of rank R's highest scores, for pictures
OUT/.scoring/shard-R-of-N.json    rank R has finished: how many files the list has, and their hash
OUT/.scoring/shard-R-of-N.lock    held while rank R runs

Ranks share nothing but this folder. Each walks the whole list, one file at a time; memory does not grow with it but for
one number a file when the shards are merged.
"""

import contextlib
import errno
import os
import pathlib
import shutil
import time
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from simsid import __version__, checkpoint
from simsid.arguments import require_path
from simsid.data import iter_records, load_images
from simsid.data.folders import patterns
from simsid.distributed import ProcessGroup
from simsid.errors import ArchiveError, InputError
from simsid.models.base import AnomalyModel
from simsid.models.scorer import BATCH
from simsid.models.signals import check_signals
from simsid.scoring.shard import Highest, Shard, read_images, read_row, write_row
from simsid.scoring.shift import find_shift
from simsid.scoring.stream import Score, columns, row, score_files
from simsid.scoring.summary import Summary

SYNC_SECONDS = 10
"""Seconds of work that a power failure may cost; a kill of the process costs one batch."""

_DIFFERENCES = {
    "data": "other data",
    "model": "another model",
    "signal": "another signal",
    "false_positive_rate": "another false positive rate",
    "batch_size": "another batch size",
    "exclude": "other patterns to exclude",
    "ranks": "another number of processes",
    "device": "another kind of device",
    "version": "another version of simsid",
}

TableVersion = tuple[int, int] | None
"""Inode and modification time of a file, or None where there is none."""

AT_CALL = (-1, -1)  # the version of no file


def score_archive(
    model: AnomalyModel,
    data: str | os.PathLike,
    output: str | os.PathLike,
    *,
    signal: str | None = None,
    false_positive_rate: float = 0.05,
    batch_size: int = BATCH,
    workers: int | None = None,
    pictures: int = 0,
    group: ProcessGroup | None = None,
    progress: bool = False,
    exclude: str | Sequence[str] = (),
    before: TableVersion = AT_CALL,
    report: Callable[[Summary], None] | None = None,
) -> Summary:
    """Score all images of a folder or list into `output`/scores.csv, each file decoded once.

    A process may be killed at any moment: the same call resumes, and no file is scored twice or left out. Of several
    ranks each scores its shard, and the last to finish merges them.

    Args:
        model: any calibrated model.
        data: a folder, a CSV list or an image, as `simsid.data.iter_records` reads it.
        output: the folder for the results; it is created.
        signal: the signal that scores and flags; None is the model's own.
        false_positive_rate: share of held-out normal images that the threshold may flag.
        batch_size: images of a forward pass.
        workers: threads that decode; None is this process's fraction of the cores.
        pictures: number of highest scores to return with their images.
        group: this process among those that score together; None is a single one.
        progress: show a progress bar.
        exclude: patterns of files to leave out, as `iter_records` takes them.
        before: `table_version` when this process started; by default that of the call. Where the table was replaced
            since, and nothing is left to do, another rank has merged.
        report: called with the summary once the table is written; a kill before its return has it called again.

    Raises:
        ArchiveError: another process scores this shard, or an unfinished scoring differs from this one.
        CalibrationError: the model has not been calibrated.
        InputError: no image, an unreadable list, an option out of range.
    """
    if pictures < 0:
        raise InputError(f"pictures must be at least 0, got {pictures}")
    require_path("data", data)
    output = pathlib.Path(require_path("output", output))
    before = table_version(output) if before == AT_CALL else before
    (name,) = check_signals([signal or model.signal], model.signal_names)
    options = _Options(name, false_positive_rate, batch_size, patterns(exclude), workers, pictures)
    archive = _Archive(model, data, output, group or ProcessGroup(), options)
    output.mkdir(parents=True, exist_ok=True)
    with archive:
        if not archive.begin(before):
            return Summary("already merged")
        resumed = done = archive.resume()
        bar = tqdm(total=archive.total, initial=done, unit=" images", disable=not progress)
        try:
            with bar:
                for _ in archive.score():
                    done += 1
                    bar.update()
        except KeyboardInterrupt:
            return Summary("interrupted", done, resumed)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise ArchiveError(
                f"no space is left on the device of {output}: free some and start the same command again, which resumes"
            ) from error
        with archive.finish() as missing:
            if missing:
                return Summary("waiting", done, resumed, tuple(missing))
            summary = replace(archive.merge(), done=done, resumed=resumed)
            if report is not None:
                report(summary)
            archive.remove()
            return summary


def table_version(output: str | os.PathLike) -> TableVersion:
    """Return what distinguishes `output`/scores.csv from a file that replaces it."""
    try:
        status = (pathlib.Path(output) / "scores.csv").stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


@dataclass(frozen=True)
class _Options:
    """How `score_archive` scores; the arguments of the same names."""

    signal: str
    false_positive_rate: float
    batch_size: int
    exclude: tuple[str, ...]
    workers: int | None
    pictures: int


class _Archive:
    """The steps of `score_archive` for one rank, in this order: begin, resume, score, finish, merge, remove."""

    def __init__(
        self,
        model: AnomalyModel,
        data: str | os.PathLike,
        output: pathlib.Path,
        group: ProcessGroup,
        options: "_Options",
    ) -> None:
        self.model, self.output, self.group, self.options = model, output, group, options
        self.folder = output / ".scoring"
        self.total: int | None = None
        """Files of this rank, None where only a walk of the folder could count them."""
        if os.path.isfile(data):
            # Read a list once before anything is computed, so that its mistakes do not show up hours later.
            count = sum(1 for _ in iter_records(data, exclude=options.exclude))
            self.total = len(range(group.rank, count, group.size))
        self._shard = Shard(iter_records(data, exclude=options.exclude), group)
        # Lazy: the files that `resume` finds done are gone from the shard when the first score is asked for.
        self._scores = score_files(
            model,
            self._shard,
            signal=options.signal,
            false_positive_rate=options.false_positive_rate,
            batch_size=options.batch_size,
            workers=options.workers or group.cpu_threads(),
        )
        self._request = {
            "data": os.path.abspath(data),
            "model": model.identity(),
            "signal": options.signal,
            "false_positive_rate": options.false_positive_rate,
            "batch_size": options.batch_size,
            "exclude": list(options.exclude),
            "ranks": group.size,
            "device": model.device.type,
            "version": __version__,
        }
        self._top = Highest(options.signal, options.pictures)
        self._lock = FileLock(output / ".scoring.lock")
        self._shard_lock = FileLock(self._file(group.rank, "lock"))

    def __enter__(self) -> "_Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self._shard_lock.release()

    def begin(self, before: TableVersion) -> bool:
        """Lock this rank's shard; False where another rank has already finished all shards and merged them.

        Raises:
            ArchiveError: another process has the shard, or an unfinished scoring differs from this one.
        """
        try:
            # Other ranks hold it briefly, or while they merge; a single process has none to wait for.
            lock = self._lock.acquire(timeout=-1 if self.group.size > 1 else 0)
        except Timeout:
            raise self._in_use() from None
        with lock:
            request = self.folder / "request.json"
            if request.exists():
                self._check_request(checkpoint.read_json(request))
            # Compared under the lock, which a rank that merges holds until the table is replaced.
            elif self.group.size > 1 and table_version(self.output) != before:
                return False
            else:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir()
                checkpoint.write_json(request, self._request)
            try:
                self._shard_lock.acquire(timeout=0)
            except Timeout:
                raise self._in_use() from None
            # Not finished again until `resume` has compared the rows with the files that exist now.
            self._file(self.group.rank, "json").unlink(missing_ok=True)
        return True

    def resume(self) -> int:
        """Return how many of this rank's files are done; a row that a kill cut short is removed.

        Raises:
            ArchiveError: the rows are not those of the files that exist now.
        """
        done = 0
        with open(self._file(self.group.rank, "jsonl"), "a+b") as rows:
            complete = rows.seek(0)
            while (score := read_row(rows, self.model.signal_names)) is not None:
                record = next(self._shard, None)
                if record is None or record.path != score.path:
                    found = f"{record.path} is found" if record else "the list ends"
                    raise ArchiveError(
                        f"{self._request['data']} has changed since its scoring began: {found} where {score.path} was "
                        f"scored; undo the change and start again, or delete {self.folder} to score everything again"
                    )
                done, complete = done + 1, rows.tell()
                self._top.add(score)
            rows.truncate(complete)
        return done

    def score(self) -> Iterator[Score]:
        """Score the remaining files of this rank and write their rows, in batches."""
        synced = time.monotonic()
        with open(self._file(self.group.rank, "jsonl"), "ab") as rows:
            for count, score in enumerate(self._scores, 1):
                self._top.add(score)
                write_row(rows, score, self.model.signal_names)
                if count % self.options.batch_size == 0:
                    rows.flush()
                    if time.monotonic() - synced > SYNC_SECONDS:
                        os.fsync(rows.fileno())
                        synced = time.monotonic()
                yield score
            rows.flush()
            os.fsync(rows.fileno())

    @contextlib.contextmanager
    def finish(self) -> Iterator[list[int]]:
        """Mark this rank's shard as complete; inside, no other rank starts or merges. Yields the ranks still missing.

        Raises:
            ArchiveError: the ranks did not see the same files.
        """
        mark = {"files": self._shard.passed, "sha256": self._shard.digest()}
        with self._lock.acquire():
            self._top.save(self._file(self.group.rank, "npz"))
            checkpoint.write_json(self._file(self.group.rank, "json"), mark)
            self._shard_lock.release()
            missing = [rank for rank in range(self.group.size) if not self._file(rank, "json").exists()]
            if not missing:
                self._check_marks(mark)
            yield missing

    def merge(self) -> Summary:
        """Write the rows of all shards in the order of the files; return the counts and the highest scores.

        Raises:
            ArchiveError: a shard is not as it was when its rank had finished.
        """
        names, name = self.model.signal_names, self.options.signal
        scored, flagged, raw, values = 0, 0, 0, array("d")
        top = Highest(name, self.options.pictures)
        table = self.output / "scores.csv"
        with contextlib.ExitStack() as stack:
            ranks = range(self.group.size)
            shards = [stack.enter_context(open(self._file(rank, "jsonl"), "rb")) for rank in ranks]
            write = stack.enter_context(checkpoint.csv_writer(table, columns(names)))
            for index in range(self._shard.passed):
                score = read_row(shards[index % len(shards)], names)
                if score is None:
                    path = self._file(index % len(shards), "jsonl")
                    raise ArchiveError(f"{path} was damaged after it was written; start the same command again")
                write(row(score, names))
                if not score.reason:
                    scored, flagged = scored + 1, flagged + bool(score.flagged)
                    raw += score.for_processing
                    values.append(score.signals[name])
                    top.add(score)
            # The report of an earlier scoring would not fit the new scores.
            (self.output / "report.html").unlink(missing_ok=True)
        held = np.asarray(self.model.calibrated().holdout.get(name, []))
        return Summary(
            "merged",
            scored=scored,
            flagged=flagged,
            failed=self._shard.passed - scored,
            for_processing=raw,
            top=self._with_images(top.ascending()),
            shift=find_shift(np.asarray(values), held),
        )

    def remove(self) -> None:
        """Remove the intermediate files, once the results are complete."""
        # A power failure must not undo the renaming of the results and keep this.
        checkpoint.sync_folder(self.output)
        # First the request, without which the rest is ignored. Failing to remove the rest is therefore harmless.
        (self.folder / "request.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _with_images(self, scores: list[Score]) -> list[Score]:
        """Return the scores with their images: as the shards have them, or read again after a resumed scoring."""
        images: dict[str, tuple[np.ndarray, Mapping[str, Any]]] = {}
        for rank in range(self.group.size):
            images |= read_images(self._file(rank, "npz"))
        missing = [score.path for score in scores if score.path not in images]
        if missing:
            try:
                read = load_images(missing, **asdict(self.model.preprocessing))
            except InputError as error:
                warnings.warn(f"some of the highest scores have no picture: {error}", stacklevel=2)
            else:
                batch = read.batch(slice(None))
                images |= {
                    record.path: (image[0].numpy(), record.provenance) for record, image in zip(read.records, batch)
                }
        found: list[tuple[np.ndarray | None, Mapping[str, Any]]] = [
            images.get(score.path, (None, {})) for score in scores
        ]
        return [replace(score, image=image, provenance=about) for score, (image, about) in zip(scores, found)]

    def _file(self, rank: int, ending: str) -> pathlib.Path:
        return self.folder / f"shard-{rank}-of-{self.group.size}.{ending}"

    def _in_use(self) -> ArchiveError:
        who = f" as rank {self.group.rank} of {self.group.size}" if self.group.size > 1 else ""
        return ArchiveError(f"{self.output} is in use by another process that scores into it{who}")

    def _check_request(self, found: dict[str, object]) -> None:
        other = [text for name, text in _DIFFERENCES.items() if found.get(name) != self._request[name]]
        if other:
            raise ArchiveError(
                f"{self.output} holds an unfinished scoring of {found.get('data')}, begun with {', '.join(other)} (see "
                f"{self.folder / 'request.json'}); repeat its options to finish it, choose another folder with -o, or "
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

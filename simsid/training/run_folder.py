"""The folder of a training run: configuration, data manifest, metrics, checkpoints, and one writer at a time.

run.json                          the request: data, model and training configuration, versions
manifest.csv                      every image: path, sha256, split, label, finding, patient
metrics.jsonl                     one line per epoch
last.json, last-*.safetensors     the training state, from which a run resumes
model.json, model-*.safetensors   the best model so far; `simsid.load(folder)` reads it
"""

import json
import os
import pathlib
import platform
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from simsid import __version__, checkpoint
from simsid.data import ImageSet
from simsid.distributed import ProcessGroup
from simsid.errors import RunError
from simsid.models.base import AnomalyModel

WRITTEN = ("run.json", "manifest.csv", "metrics.jsonl", "last.json", "last-*", "model.json", "model-*")
"""The files of a run folder; an unfinished one has a dot before its name and a random ending after it."""


class RunFolder:
    """A run folder that this process alone writes into, until it is closed or the process ends.

    Args:
        folder: created where it does not exist.

    Raises:
        RunError: another process has it, or it is a file.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.path = pathlib.Path(folder)
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"the run folder must be a folder, got the file {self.path}")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"{self.path} is in use by another process that writes into it") from None
        # Unfinished files of a killed process. Nobody writes them now: the holder of the lock is the only writer.
        for name in WRITTEN:
            for unfinished in self.path.glob(f".{name}.*"):
                unfinished.unlink(missing_ok=True)

    def close(self) -> None:
        """Let other processes write into the folder."""
        self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def started(self) -> bool:
        """Whether the folder holds a training state."""
        return (self.path / "last.json").exists()

    @property
    def taken(self) -> bool:
        """Whether the folder holds a run or a model, which a new run would overwrite."""
        return self.started or (self.path / "model.json").exists()

    def write_request(self, document: Mapping[str, object]) -> None:
        """Write run.json: the document and the versions in use."""
        with self.writing("run.json"):
            checkpoint.write_json(self.path / "run.json", {**document, "versions": versions()})

    def write_manifest(self, *parts: ImageSet | None) -> None:
        """Write manifest.csv: the record and the SHA-256 of every image, empty where it is not a file.

        Args:
            parts: the images to train on and to validate on; None is skipped.
        """
        columns = ["path", "sha256", "split", "label", "finding", "patient"]
        with self.writing("manifest.csv"), checkpoint.csv_writer(self.path / "manifest.csv", columns) as write:
            for images in parts:
                if images is not None:
                    hashes = images.sha256 or ("",) * len(images)
                    for record, digest in zip(images.records, hashes):
                        write([record.path, digest, record.split, record.label, record.finding, record.patient])

    def write_state(self, tensors: dict[str, Tensor], document: Mapping[str, object]) -> None:
        """Write the training state atomically."""
        with self.writing("last.json"):
            checkpoint.write(self.path, "last", tensors, {"kind": "simsid training state", **document})

    def write_metrics(self, epochs: Iterable[Mapping[str, object]]) -> None:
        """Replace metrics.jsonl: a resumed run drops the epochs that a killed process wrote after its last state."""
        lines = "".join(json.dumps(epoch) + "\n" for epoch in epochs)
        with self.writing("metrics.jsonl"):
            checkpoint.write_file(self.path / "metrics.jsonl", lines.encode())

    def append_metrics(self, epoch: Mapping[str, object]) -> None:
        """Append a line to metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        with self.writing("metrics.jsonl"), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(epoch) + "\n")

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Turn an error of the file system, such as a full disk, into one that names the file and the remedy.

        Raises:
            RunError: instead of an `OSError` of the block.
        """
        try:
            yield
        except OSError as error:
            path = error.filename or self.path / name
            remedy = "resume the run, whose last state is intact" if self.started else "start the run again"
            raise RunError(
                f"{path} cannot be written: {error.strerror or error}; correct this, then {remedy} ({self.path})"
            ) from error


@contextmanager
def open_run(path: pathlib.Path, document: Mapping[str, object] | None) -> Iterator[RunFolder]:
    """Lock a run folder; write the request of a new run.

    Args:
        path: the folder.
        document: the request; None opens the folder of a run that is resumed.

    Raises:
        RunError: the folder is in use, or a new run is asked for and it holds one already.
    """
    with RunFolder(path) as folder:
        if document is not None:
            if folder.taken:
                raise RunError(
                    f"{path} already holds a run or a model; resume a run with --resume {shlex.quote(str(path))}, or "
                    "choose another -o"
                )
            folder.write_request(document)
        yield folder


def fit_in_folder(
    model: AnomalyModel,
    folder: RunFolder | None,
    train: ImageSet,
    val: ImageSet | None,
    *,
    progress: bool = False,
    group: ProcessGroup | None = None,
) -> None:
    """Fit a model in one pass over the images, and leave it in a run folder with a list of the images.

    Of the ranks of a group, rank 0 alone has the folder.
    """
    group = group or ProcessGroup()
    if folder is not None:
        folder.write_manifest(train, val)
    model.fit(train, val, progress=progress and group.main, group=group)
    if folder is not None:
        with folder.writing("model.json"):
            model.save(folder.path)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "simsid": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }

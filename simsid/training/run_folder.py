"""The folder of a training run: configuration, data manifest, metrics, checkpoints, and one writer at a time.

run.json        what was asked: data, model and training configuration, versions
manifest.csv    every file: path, sha256, split, label, finding, patient
metrics.jsonl   one line an epoch
last.json, last-*.safetensors      the training state; training goes on from here
model.json, model-*.safetensors    the best model so far; `Model.load(run)` reads it
"""

import csv
import hashlib
import io
import json
import os
import pathlib
import platform
from collections.abc import Iterable

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from simsid import __version__, checkpoint
from simsid.errors import RunError

WRITTEN = ("run.json", "manifest.csv", "metrics.jsonl", "last.json", "last-*", "model.json", "model-*")
"""What a run folder consists of; a file being written has its name with a dot before and an ending after."""


class RunFolder:
    """A run folder held by this process; a second holder is refused, and a killed one lets go."""

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
        # What a killed process was writing; the holder of the lock is the only writer.
        for name in WRITTEN:
            for unfinished in self.path.glob(f".{name}.*"):
                unfinished.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def started(self) -> bool:
        """Whether a training state lies here."""
        return (self.path / "last.json").exists()

    @property
    def taken(self) -> bool:
        """Whether a run or a model lies here, which a new run would overwrite."""
        return self.started or (self.path / "model.json").exists()

    def write_request(self, document: dict[str, object]) -> None:
        """Write run.json."""
        checkpoint.write_json(self.path / "run.json", {**document, "versions": versions()})

    def read_request(self) -> dict[str, object]:
        """Read run.json."""
        return checkpoint.read_json(self.path / "run.json")

    def write_manifest(self, records: Iterable[object]) -> None:
        """Write manifest.csv: the records with the hash of each file (empty for images that are no files)."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "sha256", "split", "label", "finding", "patient"])
        for record in records:
            label = "" if record.label is None else record.label
            writer.writerow([record.path, _sha256(record.path), record.split, label, record.finding, record.patient])
        # File names may hold bytes that are no UTF-8; they are written as they are.
        checkpoint.write_file(self.path / "manifest.csv", text.getvalue().encode("utf-8", "surrogateescape"))

    def write_state(self, tensors: dict[str, Tensor], document: dict[str, object]) -> None:
        """Write the training state, whole or not at all."""
        checkpoint.write(self.path, "last", tensors, {"kind": "simsid training state", **document})

    def write_metrics(self, epochs: list[dict[str, object]]) -> None:
        """Write metrics.jsonl anew, as after a resume: what a killed process wrote beyond its state goes."""
        lines = "".join(json.dumps(epoch) + "\n" for epoch in epochs)
        checkpoint.write_file(self.path / "metrics.jsonl", lines.encode())

    def append_metrics(self, epoch: dict[str, object]) -> None:
        """Add a line to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(epoch) + "\n")


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    import numpy as np

    return {
        "simsid": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest()

"""What several commands share: options, devices, loading, and the reports of evaluations and scorings."""

import contextlib
import dataclasses
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from simsid.errors import CalibrationError, IncompleteError, InputError, UsageError
from simsid.parallel import CoreUse, uncontended_threads

if TYPE_CHECKING:
    from simsid.data import Dataset, ImageSet, Preprocessing, Record
    from simsid.distributed import ProcessGroup
    from simsid.evaluation import Evaluation
    from simsid.models import AnomalyModel
    from simsid.report import MemoryViews

Data = Positional[Annotated[pathlib.Path, arg(metavar="DATA")]]
ModelFolder = Positional[Annotated[str, arg(metavar="MODEL")]]
Output = Annotated[pathlib.Path, arg(aliases=["-o"], metavar="FOLDER")]
MaybeOutput = Annotated[pathlib.Path | None, arg(aliases=["-o"], metavar="FOLDER")]
Exclude = Annotated[tuple[str, ...], arg(metavar="PATTERN ...")]
SignalName = Annotated[str | None, arg(metavar="NAME")]
PrecisionName = Literal["auto", "float32", "bfloat16"]
SplitName = Annotated[str | None, arg(metavar="NAME")]


STARTED = CoreUse.now()
"""Before PyTorch is imported, which takes long enough to see what else the machine does."""


@dataclass(frozen=True)
class Machine:
    """Options of every command that computes."""

    device: str = "auto"
    """Device to compute on: auto, cpu, cuda or cuda:1."""
    threads: int = 0
    """CPU threads; 0 is one for each core that other work leaves free, at least one."""
    workers: int = 0
    """Threads that decode images; 0 is one per core."""

    def prepare(self, group: "ProcessGroup | None" = None) -> str:
        """Set the number of threads and return the device, of a single process or of one in a group."""
        import torch

        from simsid.distributed import ProcessGroup

        group = group or ProcessGroup()
        if self.threads < 0 or self.workers < 0:
            raise UsageError(f"threads and workers must be at least 0, got {self.threads} and {self.workers}")
        threads = self.threads
        # torchrun sets one thread a process; a single process would take cores that a container's quota denies it.
        if not threads and (group.size > 1 or torch.get_num_threads() > group.cpu_threads()):
            threads = group.cpu_threads()
        if not threads and group.size == 1 and "OMP_NUM_THREADS" not in os.environ:
            threads = _threads_beside_other_work(torch.get_num_threads())
        if threads:
            torch.set_num_threads(threads)
        if self.device == "auto":
            return group.select_device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            device = torch.device("meta")
        if device.type not in ("cpu", "cuda"):
            raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"device {self.device} was asked for, but PyTorch sees no GPU; see `simsid doctor`")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"device {self.device} was asked for, but PyTorch sees {torch.cuda.device_count()} GPUs")
        return group.select_device(self.device)


def _threads_beside_other_work(threads: int) -> int:
    """Return fewer than `threads` where other processes kept cores busy since the program started, and say so."""
    later = CoreUse.now()
    if STARTED is None or later is None or threads == 1:
        return threads
    busy = STARTED.busy_elsewhere(later)
    fewer = min(threads, uncontended_threads(threads, busy))
    if fewer < threads:
        print(
            f"simsid: note: other work keeps {busy:.1f} of {threads} cores busy, so {fewer} "
            f"thread{'s are' if fewer > 1 else ' is'} used; --threads {threads} uses every core",
            file=sys.stderr,
        )
    return fewer


def calibrated_model(name: str, device: str, precision: str = "auto") -> "AnomalyModel":
    """Load a model that can score, or say what is missing."""
    from simsid.models import load

    model = load(name, device=device, precision=precision)
    if model.calibration is None:
        raise UsageError(
            f"{name} is not calibrated, which scores need: finish its training, or run simsid calibrate {name} DATA "
            "with normal images"
        )
    try:
        model.calibrated()
    except CalibrationError as error:  # another precision, which would be refused only after all images are read
        raise UsageError(str(error).replace(" MODEL ", f" {shlex.quote(name)} ")) from None
    return model


def load_set(
    records: "Sequence[Record]",
    preprocessing: "Preprocessing",
    workers: int,
    group: "ProcessGroup | None" = None,
) -> "ImageSet":
    """Load images into memory; the ranks of a group decode a shard each."""
    from simsid.data import load_images
    from simsid.distributed import ProcessGroup

    group = group or ProcessGroup()
    return load_images(
        records,
        **dataclasses.asdict(preprocessing),
        workers=workers or None,
        progress=group.main and sys.stderr.isatty(),
        decode=group.in_order,
    )


def usual_split(dataset: "Dataset") -> str | None:
    """Return the split that is evaluated where none is named: test, or else val, or else every image."""
    splits = {record.split for record in dataset.records}
    return next((name for name in ("test", "val") if name in splits), None)


def refuse_file(path: pathlib.Path) -> None:
    """Refuse a file where a folder for results is meant."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"the output must be a folder, got the file {path}")


def refuse_output_among_images(data: pathlib.Path, output: pathlib.Path) -> None:
    """Refuse to draw among the images, where the next command would take the pictures for radiographs."""
    data, output = data.resolve(), output.resolve()
    if data.is_dir() and output.is_relative_to(data):
        raise UsageError(f"the output must lie outside the folder of images {data}, got {output}")


def output_folder(path: pathlib.Path) -> pathlib.Path:
    """Create the folder for results; refuse a file."""
    refuse_file(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def clear_film_pages(folder: pathlib.Path) -> None:
    """Remove the pages of single images that an earlier report left, and nothing else that is in their folder."""
    for page in (folder / "films").glob("*.html"):
        if re.fullmatch(r"[A-Za-z0-9-]+-[0-9a-f]{12}", page.stem):
            page.unlink()


def write_failures(path: pathlib.Path, failures: "Iterable[Any]") -> None:
    """Write the files that could not be read, with their reasons; no failure leaves no file."""
    from simsid import checkpoint

    path.unlink(missing_ok=True)
    rows = [[failure.path, failure.reason] for failure in failures]
    if rows:
        with checkpoint.csv_writer(path, ["path", "reason"]) as write:
            for cells in rows:
                write(cells)


def write_evaluation_report(
    model: "AnomalyModel",
    images: "ImageSet",
    evaluation: "Evaluation",
    path: pathlib.Path,
    title: str,
    notes: Sequence[str] = (),
    configuration: dict[str, Any] | None = None,
    memory: "MemoryViews | None" = None,
) -> None:
    """Write report.html of labelled images, with examples at even steps through the scores of each kind."""
    from simsid import report
    from simsid.report import selection

    clear_film_pages(path.parent)
    examples = selection.examples_of_set(model, images, evaluation, selection.typical_indices(evaluation))
    rows = selection.evaluation_rows(model, images, evaluation, [example.path for example in examples])
    report.write_report(
        path,
        title=title,
        evaluation=evaluation,
        examples=examples,
        rows=rows,
        configuration={"model": described(model), **(configuration or {})},
        versions=versions(),
        notes=list(notes),
        warnings=for_processing_notes(sum(record.for_processing for record in images.records)),
        descriptions=selection.descriptions(model),
        memory=memory,
    )
    selection.write_film_pages(path, model, rows, examples)


def for_processing_notes(count: int) -> list[str]:
    """Return a warning where some images are raw detector data, whose gray scale is not that of a diagnostic image."""
    if not count:
        return []
    return [f"{count} images are stored FOR PROCESSING: their gray values are not those meant for display."]


def described(model: "AnomalyModel") -> dict[str, object]:
    """Return a model's kind and configuration for reports."""
    _, document = model.state()
    config = document.get("config")
    return {"kind": model.kind, **(config if isinstance(config, dict) else {})}


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    from simsid.training import run_folder

    return run_folder.versions()


@contextlib.contextmanager
def saved(what: str) -> Iterator[None]:
    """Turn an error of what follows into `IncompleteError`, which says that the main result exists."""
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        raise IncompleteError(f"{what}, but writing the report failed: {type(error).__name__}: {error}") from error


def check_images(data: str | os.PathLike, count: int, least: int, what: str) -> None:
    """Refuse a data set with fewer images than something needs."""
    if count < least:
        raise InputError(f"{what} needs at least {least} images, got {count} in {os.fspath(data)}")

"""`simsid report`."""

import os
import pathlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import OmitArgPrefixes, Positional, arg

from simsid.commands.common import (
    Machine,
    MaybeOutput,
    calibrated_model,
    described,
    load_set,
    output_folder,
    versions,
    write_evaluation_report,
)
from simsid.errors import UsageError, printable

if TYPE_CHECKING:
    from simsid.data import ImageSet, Record
    from simsid.models import AnomalyModel, MemoryContents
    from simsid.report import MemoryViews


@dataclass(frozen=True)
class Report:
    """Write one page about a finished run: its validation images, and what its memories hold and use.

    The images are those of the run's manifest.csv, at the places where they were; those of DigitAnatomy, which a demo
    or a study was trained on, are drawn again.
    """

    folder: Positional[Annotated[pathlib.Path, arg(metavar="RUN")]]
    """Run folder, as `simsid train`, `simsid demo` or `simsid study` (STUDY/MODEL/seed-0) wrote it."""
    output: MaybeOutput = None
    """Folder for report.html; without it RUN/memory."""
    beside: Annotated[pathlib.Path | None, arg(metavar="RUN")] = None
    """Another run whose memory is shown beside this one's, such as one with a memory queue."""
    images: int = 256
    """Normal training images that are looked up, spread evenly over the manifest."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Read the run and write the page."""
        from simsid import report

        if self.images < 8:
            raise UsageError(f"images must be at least 8, got {self.images}")
        device, workers = self.machine.prepare(), self.machine.workers
        model = _finished(self.folder, device)
        train, val = run_images(self.folder, model, workers)
        path = (self.output or self.folder / "memory") / "report.html"
        title = f"simsid: {self.folder.resolve().name}"
        labelled = val.select(val.labels >= 0) if val is not None else None
        if labelled is not None and {0, 1} <= set(labelled.labels):
            from simsid.evaluation import evaluate
            from simsid.report.memory import extremes

            evaluation = evaluate(model, labelled)
            views = self._views(model, train, labelled, extremes(evaluation), device, workers)
            output_folder(path.parent)
            notes = ["The figures are of the run's validation images: where they chose the epoch, they are optimistic."]
            write_evaluation_report(model, labelled, evaluation, path, title, notes, memory=views)
        else:
            views = self._views(model, train, None, [], device, workers)
            output_folder(path.parent)
            report.write_report(
                path,
                title=title,
                evaluation=None,
                examples=[],
                configuration={"model": described(model)},
                versions=versions(),
                notes=["The run has no labeled validation images of both classes: there are no figures to show."],
                memory=views,
            )
        print(f"report: {printable(str(path))}")
        return 0

    def _views(
        self,
        model: "AnomalyModel",
        train: "ImageSet",
        val: "ImageSet | None",
        shown: list[int],
        device: str,
        workers: int,
    ) -> "MemoryViews":
        from simsid.report import MemoryViews
        from simsid.report.memory import stored_neighbors

        contents = model.memories(self._spread(train))
        other = self._other(device, workers) if self.beside is not None else None
        neighbors = stored_neighbors(model, train, val, shown) if val is not None else []
        return MemoryViews(contents, other, neighbors)

    def _other(self, device: str, workers: int) -> "tuple[str, MemoryContents]":
        """Return the name of the run beside this one, and its first memory."""
        assert self.beside is not None
        model = _finished(self.beside, device)
        train, _ = run_images(self.beside, model, workers)
        contents = model.memories(self._spread(train))
        if not contents:
            raise UsageError(f"{self.beside} has no memory to show beside that of {self.folder}")
        return self.beside.resolve().name, contents[0]

    def _spread(self, train: "ImageSet") -> "ImageSet":
        count = min(self.images, len(train))
        return train.select(np.linspace(0, len(train) - 1, count).round().astype(int))


def _finished(folder: pathlib.Path, device: str) -> "AnomalyModel":
    """Load the model of a run; say so where the run is not one, or not finished."""
    from simsid import checkpoint

    _refuse_no_run(folder)
    model = calibrated_model(f"{folder}/", device)
    if (folder / "last.json").exists():
        progress: Any = checkpoint.read_json(folder / "last.json").get("progress")
        if isinstance(progress, dict) and not progress.get("finished"):
            print(f"simsid: note: {folder} is not finished; the page shows its best model so far", file=sys.stderr)
    return model


def _refuse_no_run(folder: pathlib.Path) -> None:
    """Refuse a folder without a run; say what to give or do instead."""
    from simsid.models.loading import shipped_models

    if (folder / "run.json").exists():
        return
    if not folder.exists() and str(folder) in shipped_models():
        raise UsageError(
            f"{folder} comes with simsid, without a run and its images; for a report on yours use simsid score "
            f"{folder} FOLDER -o DIR, or for labeled ones simsid evaluate {folder} FOLDER -o DIR"
        )
    if not folder.exists():
        raise UsageError(f"{folder} does not exist; give a run folder, which `simsid train` writes")
    runs = sorted((*folder.glob("seed-*/run.json"), *folder.glob("*/seed-*/run.json")))
    if runs:
        raise UsageError(f"{folder} is not a run: it holds {len(runs)} of a study; give one, such as {runs[0].parent}")
    raise UsageError(f"{folder} is not a run: it has no run.json, which `simsid train` writes")


def run_images(folder: pathlib.Path, model: "AnomalyModel", workers: int) -> "tuple[ImageSet, ImageSet | None]":
    """Load what a run was trained on and validated on."""
    from simsid import checkpoint
    from simsid.data import DigitAnatomy

    request: dict[str, Any] = checkpoint.read_json(folder / "run.json")
    if request.get("command") == "demo":
        if request.get("mnist"):
            raise UsageError(f"{folder} was trained on MNIST's files, which the report does not read again")
        data = DigitAnatomy(seed=int(request["seed"]), train=int(request["images"]))
        train, val = (data.load(split, model.preprocessing.image_size) for split in ("train", "val"))
        return train, val
    records = _manifest(folder / "manifest.csv")
    # Images that were drawn have names below the folder of the list, where no file is.
    drawn = os.path.join(os.path.abspath(folder), "digits", "")
    if request.get("command") == "study" and all(record.path.startswith(drawn) for record in records):
        return _study_images(folder, request, model)
    _refuse_missing(folder / "manifest.csv", records)
    loaded = [
        load_set(part, model.preprocessing, workers) if part else None
        for part in ([record for record in records if record.split == split] for split in ("train", "val"))
    ]
    if loaded[0] is None:
        raise UsageError(f"{folder / 'manifest.csv'} lists no training image")
    return loaded[0], loaded[1]


def _study_images(
    folder: pathlib.Path, request: dict[str, Any], model: "AnomalyModel"
) -> "tuple[ImageSet, ImageSet | None]":
    """Draw the images of DigitAnatomy again that a study's run was trained on, and its validation images."""
    from simsid import checkpoint
    from simsid.study import STUDIES, StudyImages

    file = folder.resolve().parent.parent / "study.json"
    if not file.exists():
        raise UsageError(f"{folder} lies outside of its study, whose {file.name} says which images were drawn")
    study = STUDIES.get(str(checkpoint.read_json(file).get("study")))
    if study is None:
        raise UsageError(f"{file} must name one of the studies {', '.join(STUDIES)}")
    contaminated = any(cell.normal_share < 1 for cell in study.cells)
    images = StudyImages(None, most=request["train"], contaminated=contaminated)
    train = images.train(model.preprocessing, request["normal_share"], request["seed"])
    return train, images.val(model.preprocessing, labeled=True)


def _manifest(path: pathlib.Path) -> "list[Record]":
    """Read a run's list of images."""
    import warnings

    from simsid.data import read_csv

    with warnings.catch_warnings():
        # The column of hashes, which a list of images does not have.
        warnings.simplefilter("ignore", UserWarning)
        return read_csv(path)


def _refuse_missing(path: pathlib.Path, records: "list[Record]") -> None:
    """Name the first image of a list that is gone."""
    from simsid.data import missing_files

    missing = missing_files(records)
    if missing:
        raise UsageError(f"{len(missing)} of {len(records)} images of {path} do not exist, the first: {missing[0]}")

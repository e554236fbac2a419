"""`simsid train`."""

import contextlib
import dataclasses
import pathlib
import shlex
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from simsid.commands.common import Exclude, Machine, MaybeOutput, load_set, saved, write_evaluation_report
from simsid.config import Config, ConfigName, PresetName, TrainingConfig
from simsid.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from simsid.data import ImageSet, Record
    from simsid.distributed import ProcessGroup
    from simsid.models import AnomalyModel
    from simsid.training import History


@dataclass(frozen=True)
class Train:
    """Train a model on a folder or list of radiographs, normal ones only.

    Under torchrun, the processes share every batch; rank 0 writes.
    """

    data: Positional[Annotated[pathlib.Path | None, arg(metavar="[DATA]")]] = None
    """ZhangLab's, CheXpert's or COVIDx's folder as published, any folder of normal images, or a CSV (path,label,split,
    patient)."""
    output: MaybeOutput = None
    """Run folder; without it runs/NAME-PRESET."""
    resume: Annotated[pathlib.Path | None, arg(metavar="RUN")] = None
    """Resume the run in this folder, with the options it was started with; DATA is needed only where the images have
    moved."""
    preset: PresetName = "simsid"
    """Published configuration or baseline that the model options below start from."""
    ablation: ConfigName | None = None  # type: ignore[valid-type]
    """Component study's configuration to start from instead."""
    val_share: float = 0.1
    """Fraction of the training images held out where the data has too few normal validation images."""
    exclude: Exclude = ()
    """Files to leave out, as patterns of their path below the folder, such as masks/*."""
    model: OmitArgPrefixes[Config] = field(default_factory=Config)
    training: OmitArgPrefixes[TrainingConfig] = field(default_factory=TrainingConfig)
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Train or resume; Ctrl-C leaves a run that `--resume` resumes."""
        from simsid.distributed import ProcessGroup

        request = self._resumed(self.resume) if self.resume else self
        group = ProcessGroup.from_environment()
        device = request.machine.prepare(group)
        workers = self.machine.workers or group.cpu_threads()
        with group.joined(device):
            return self._train(request, device, workers, group)

    def _train(self, request: "Train", device: str, workers: int, group: "ProcessGroup") -> int:
        import torch

        from simsid.models.presets import seeded_model
        from simsid.training import Trainer
        from simsid.training.run_folder import open_run
        from simsid.training.step import with_chosen_precision

        source = request.source()
        train_records, val_records = group.broadcast(lambda: split(source, request))
        path = self.resume or request.output or pathlib.Path("runs") / f"{source.resolve().stem}-{request.name}"
        model: Any = seeded_model(request.name, request.model, request.training.seed, device)
        # run.json keeps the precision chosen here, in which the run resumes on any machine.
        request = dataclasses.replace(request, training=with_chosen_precision(request.training, model))
        with contextlib.ExitStack() as stack:
            document = None if self.resume else request.document(torch.get_num_threads())
            folder = stack.enter_context(open_run(path, document)) if group.main else None
            trainer = Trainer(model, request.training, run=folder or path, progress=True, group=group)
            train, val = load_both(train_records, val_records, model, workers, group)
            if folder is not None:
                # A resumed run may have been killed before the manifest was written.
                if not (self.resume and (path / "manifest.csv").exists()):
                    folder.write_manifest(train, val)
                report_loaded(path, train, val)
            history = trainer.fit(train, val, resume=self.resume is not None)
            if group.main:
                self._conclude(request, path, model, val, history)
            return 130 if history.interrupted else 0

    def _conclude(
        self, request: "Train", path: pathlib.Path, model: "AnomalyModel", val: "ImageSet | None", history: "History"
    ) -> None:
        """Print the result, and report on the validation images where they are labelled."""
        quoted = shlex.quote(str(path))
        if history.interrupted:
            print(f"stopped; resume with: simsid train --resume {quoted}", file=sys.stderr)
            return
        kept = (history.best_epoch or 0) + 1
        print(f"kept epoch {kept}; use it with: simsid score {quoted} FOLDER -o DIR", flush=True)
        chosen = ["These images chose the epoch that was kept: the figures are optimistic."]
        extra = {"training": request.training.to_dict()}
        report_validation(model, val, path, f"simsid: {request.source().resolve().name}, validation", chosen, extra)

    @property
    def name(self) -> str:
        """The configuration's name."""
        return self.ablation or self.preset

    def source(self) -> pathlib.Path:
        """Return DATA, or say that it is missing."""
        if self.data is None:
            raise UsageError("train needs a folder or CSV of images, or --resume RUN")
        return self.data

    def document(self, threads: int) -> dict[str, object]:
        """Return what run.json keeps of the request."""
        return {
            "command": "train",
            "model": self.model.to_dict(),
            "training": self.training.to_dict(),
            "data": str(self.source().resolve()),
            "val_share": self.val_share,
            "exclude": list(self.exclude),
            # Another number of threads sums in another order.
            "machine": {"device": self.machine.device, "threads": threads},
        }

    def _resumed(self, folder: pathlib.Path) -> "Train":
        from simsid.checkpoint import read_json

        file = folder / "run.json"
        if not file.exists():
            raise UsageError(f"{folder} is not a run; start one with: simsid train DATA -o {folder}")
        document: dict[str, Any] = read_json(file)
        if document.get("command") != "train":
            raise UsageError(
                f"{folder} was fitted in one pass and has nothing to resume; train again with another -o"
                if document.get("command") == "fit"
                else f"{folder} was not started by `simsid train`"
            )
        try:
            machine = document["machine"]
            return dataclasses.replace(
                self,
                data=self.data or pathlib.Path(document["data"]),
                val_share=document["val_share"],
                exclude=tuple(document.get("exclude", ())),
                model=Config.from_dict(document["model"]),
                training=TrainingConfig.from_dict(document["training"]),
                machine=dataclasses.replace(
                    self.machine,
                    device=machine["device"] if self.machine.device == "auto" else self.machine.device,
                    threads=self.machine.threads or machine["threads"],
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} is not a run's request: {error}") from None


def split(source: pathlib.Path, request: Any) -> "tuple[list[Record], list[Record]]":
    """Return the records to train on and to validate on."""
    from simsid.data import open_dataset, partition

    return partition(open_dataset(source, exclude=request.exclude), request.val_share)


def load_both(
    train_records: "list[Record]",
    val_records: "list[Record]",
    model: "AnomalyModel",
    workers: int,
    group: "ProcessGroup | None" = None,
) -> "tuple[ImageSet, ImageSet | None]":
    """Load the images to train on, and those to validate on where there are any."""
    train = load_set(train_records, model.preprocessing, workers, group)
    return train, load_set(val_records, model.preprocessing, workers, group) if val_records else None


def report_loaded(path: pathlib.Path, train: "ImageSet", val: "ImageSet | None") -> None:
    """Print what is trained on, so that a folder of mixed images is noticed; write failures.csv."""
    from simsid.commands.common import write_failures

    failures = [*train.failures, *(val.failures if val is not None else ())]
    write_failures(path / "failures.csv", failures)
    unlabelled = int((train.labels < 0).sum())
    abnormal = int((val.labels == 1).sum()) if val is not None else 0
    normal = len(val) - abnormal if val is not None else 0
    note = f" ({unlabelled} without a label, taken as normal)" if unlabelled else ""
    text = f"training on {len(train)} images{note}, validating on {normal} normal and {abnormal} abnormal"
    print(text + (f"; {len(failures)} files could not be read (failures.csv)" if failures else ""), flush=True)


def report_validation(
    model: "AnomalyModel",
    val: "ImageSet | None",
    path: pathlib.Path,
    title: str,
    notes: list[str],
    configuration: dict[str, Any],
) -> None:
    """Print the table and write report.html of the labelled validation images, where both classes are among them."""
    from simsid.evaluation import evaluate, format_table

    labelled = val.select(val.labels >= 0) if val is not None else None
    if labelled is None or not {0, 1} <= set(labelled.labels):
        return
    with saved(f"the model is trained and saved in {path}"):
        evaluation = evaluate(model, labelled)
        print(format_table(evaluation), flush=True)
        write_evaluation_report(model, labelled, evaluation, path / "report.html", title, notes, configuration)
    print(f"report: {path / 'report.html'}")

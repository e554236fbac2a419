"""The command line: each command is a dataclass whose fields are its options."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand

from simsid.config import ABLATIONS, PRESETS, Config, TrainingConfig
from simsid.errors import ConfigError, IncompleteError, RunError, UsageError

if TYPE_CHECKING:
    from simsid.data import Dataset, ImageSet, Record
    from simsid.distributed import Rank, Team
    from simsid.metrics import Evaluation
    from simsid.models.model import Model
    from simsid.scoring.archive import Summary, Work
    from simsid.training.run_folder import RunFolder
    from simsid.training.trainer import History

RESEARCH = "For research use only; not a medical device."

RESUMABLE = ("resume", "device", "threads", "workers", "help")
"""Options that may stand beside `--resume`: what is computed was settled when the run was started."""

Data = Annotated[pathlib.Path, arg(metavar="DATA")]
ModelFolder = Annotated[pathlib.Path, arg(metavar="MODEL")]
Output = Annotated[pathlib.Path, arg(aliases=["-o"], metavar="FOLDER")]
MaybeOutput = Annotated[pathlib.Path | None, arg(aliases=["-o"], metavar="FOLDER")]


@dataclass(frozen=True)
class Machine:
    """Options of every command that computes."""

    device: str = "auto"
    """Where to compute: auto, cpu, cuda or cuda:1."""
    threads: int = 0
    """CPU threads; 0 is one a core. Where other work keeps the cores busy, fewer are faster."""
    workers: int = 0
    """Threads that decode images; 0 is one a core."""

    def prepare(self, rank: "Rank | None" = None) -> str:
        """Set the threads and return the device, of one process or of one of several."""
        import torch

        from simsid.distributed import Rank

        rank = rank or Rank()
        if self.threads < 0 or self.workers < 0:
            raise UsageError(f"threads and workers must be at least 0, got {self.threads} and {self.workers}")
        threads = self.threads
        # torchrun leaves each process one; alone, PyTorch takes cores that a container's quota keeps from it.
        if not threads and (rank.count > 1 or torch.get_num_threads() > rank.workers()):
            threads = rank.workers()
        if threads:
            torch.set_num_threads(threads)
        if self.device == "auto":
            return rank.take_device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            kind = torch.device(self.device).type
        except RuntimeError:
            kind = ""
        if kind not in ("cpu", "cuda"):
            raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        if kind == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"device {self.device} was asked for, but PyTorch sees no GPU; see `simsid doctor`")
        if kind == "cuda" and (torch.device(self.device).index or 0) >= torch.cuda.device_count():
            raise UsageError(f"device {self.device} was asked for, but PyTorch sees {torch.cuda.device_count()} GPUs")
        return rank.take_device(self.device)


@dataclass(frozen=True)
class Demo:
    """Train on DigitAnatomy and report: no download, no GPU, a few minutes on two cores."""

    output: Output = pathlib.Path("simsid-demo")
    """Folder for the trained model and report.html; an earlier demo there is replaced."""
    epochs: int = 7
    """Passes over the training images."""
    images: int = 2000
    """Normal training images to draw."""
    seed: int = 0
    """Seed of digits, weights and training."""
    mnist: pathlib.Path | None = None
    """Folder with MNIST's four idx files, to be used instead of scikit-learn's digits."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Train, evaluate on held-out digits, print the table, write the report."""
        from simsid.commands import demo_data as demo
        from simsid.metrics import format_table
        from simsid.scoring import stream as scoring
        from simsid.training import run_folder as runs
        from simsid.training.trainer import Trainer

        device = self.machine.prepare()
        config, training = Config.digit_anatomy(), demo.training(self.epochs, self.seed)
        if self.images < 2:
            raise UsageError(f"images must be at least 2, got {self.images}")
        data = demo.data(self.seed, self.images, self.mnist)
        _check_replaceable(self.output, "demo")
        with runs.RunFolder(self.output) as folder:
            _clear_run(folder.path)
            folder.write_request(_request("demo", config, training, {"images": self.images, "seed": self.seed}))
            train, val, test = (data.load(split, config.image_size) for split in ("train", "val", "test"))
            print(
                f"DigitAnatomy: {len(train)} normal images to train on; {len(val)} to validate, {len(test)} to test",
                flush=True,
            )
            model = _model(config, self.seed, device)
            history = Trainer(model, training, run=folder, progress=True).fit(train, val)
            if history.interrupted:
                print("stopped; run the demo again to start anew", file=sys.stderr)
                return 130
            evaluation, report = scoring.evaluate(model, test), self.output / "report.html"
            print(format_table(evaluation.rows()), flush=True)
            with _saved(f"the model is trained and saved in {self.output}"):
                _write_report(model, test, evaluation, report, "simsid demo: DigitAnatomy", demo.NOTES, training)
        print(f"report: {report}    model: simsid score {shlex.quote(str(self.output))} FOLDER -o DIR")
        return 0


@dataclass(frozen=True)
class Train:
    """Train a model on a folder or list of radiographs, normal ones only.

    Under torchrun, the processes share every batch; the first of them writes.
    """

    data: Positional[Annotated[pathlib.Path | None, arg(metavar="[DATA]")]] = None
    """ZhangLab's, CheXpert's or COVIDx's folder as published, any folder of normal images, or a CSV (path,label,split,
    patient)."""
    output: MaybeOutput = None
    """Run folder; without it runs/NAME-PRESET."""
    resume: Annotated[pathlib.Path | None, arg(metavar="RUN")] = None
    """Continue the run in this folder, with the options it was started with; DATA is needed only where the images have
    moved."""
    preset: Literal["simsid", "squid", "digit_anatomy", "memae", "autoencoder"] = "simsid"
    """Published configuration that the model options below start from."""
    ablation: Literal[tuple(ABLATIONS)] | None = None
    """Component study's configuration to start from instead."""
    val_share: float = 0.1
    """Share of the training images held out where the data has too few normal validation images."""
    model: OmitArgPrefixes[Config] = field(default_factory=Config)
    training: OmitArgPrefixes[TrainingConfig] = field(default_factory=TrainingConfig)
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Train or resume; Ctrl-C leaves a run that `--resume` continues."""
        from simsid.distributed import Rank, Team

        request = self._resumed() if self.resume else self
        if request.data is None:
            raise UsageError("train needs a folder or CSV of images, or --resume RUN")
        rank = Rank.from_environment()
        device = request.machine.prepare(rank)
        workers = self.machine.workers or rank.workers()
        if rank.count == 1:
            return self._train(request, device, workers, Team())
        with Team.gathered(device) as team:
            return self._train(request, device, workers, team)

    def _train(self, request: "Train", device: str, workers: int, team: "Team") -> int:
        from simsid.data import open_dataset
        from simsid.training.trainer import Trainer

        train_records, val_records = team.from_main(lambda: partition(open_dataset(request.data), request.val_share))
        path = self.resume or request.output or pathlib.Path("runs") / f"{request.data.resolve().stem}-{request.name}"
        model = _model(request.model, request.training.seed, device)
        with self._folder(request, path) if team.main else contextlib.nullcontext(path) as folder:
            trainer = Trainer(model, request.training, run=folder, progress=True, team=team)
            # A resumed run may have been killed before it was written.
            if team.main and not (self.resume and (path / "manifest.csv").exists()):
                folder.write_manifest([*train_records, *val_records])
            train = _load(train_records, request.model, workers, team)
            val = _load(val_records, request.model, workers, team) if val_records else None
            if team.main:
                failures = [*train.failures, *(val.failures if val else ())]
                (path / "failures.csv").unlink(missing_ok=True)
                if failures:
                    with _table(path / "failures.csv", ["path", "reason"]) as write:
                        for failure in failures:
                            write([failure.path, failure.reason])
                print(_summary(train, val, len(failures)), flush=True)
            history = trainer.fit(train, val, resume=self.resume is not None)
            if team.main:
                self._conclude(request, path, model, val, history)
            return 130 if history.interrupted else 0

    @contextlib.contextmanager
    def _folder(self, request: "Train", path: pathlib.Path) -> "Iterator[RunFolder]":
        """Hold the run folder, with the request in it."""
        import torch

        from simsid.training import run_folder as runs

        with runs.RunFolder(path) as folder:
            if not self.resume:
                if folder.taken:
                    raise RunError(
                        f"{path} already holds a run or a model; "
                        f"continue a run with --resume {shlex.quote(str(path))}, or choose another -o"
                    )
                extra = {
                    "data": str(request.data.resolve()),
                    "val_share": request.val_share,
                    # Another number of threads sums in another order.
                    "machine": {"device": self.machine.device, "threads": torch.get_num_threads()},
                }
                folder.write_request(_request("train", request.model, request.training, extra))
            yield folder

    def _conclude(
        self, request: "Train", path: pathlib.Path, model: "Model", val: "ImageSet | None", history: "History"
    ) -> None:
        """Say what came of it, and report on the validation images where they are labelled."""
        from simsid.metrics import format_table
        from simsid.scoring import stream as scoring

        quoted = shlex.quote(str(path))
        if history.interrupted:
            print(f"stopped; continue with: simsid train --resume {quoted}", file=sys.stderr)
            return
        print(f"kept epoch {history.best_epoch + 1}; use it with: simsid score {quoted} FOLDER -o DIR", flush=True)
        labelled = val.select(val.labels >= 0) if val is not None else None
        if labelled is not None and {0, 1} <= set(labelled.labels):
            title = f"simsid: {request.data.resolve().name}, validation"
            notes = ["These images chose the epoch that was kept: the figures are optimistic."]
            with _saved(f"the model is trained and saved in {path}"):
                evaluation = scoring.evaluate(model, labelled)
                print(format_table(evaluation.rows()), flush=True)
                _write_report(model, labelled, evaluation, path / "report.html", title, notes, request.training)
            print(f"report: {path / 'report.html'}")

    @property
    def name(self) -> str:
        """The configuration's name."""
        return self.ablation or self.preset

    def _resumed(self) -> "Train":
        from simsid.checkpoint import read_json
        from simsid.errors import CheckpointError

        file = self.resume / "run.json"
        if not file.exists():
            raise UsageError(f"{self.resume} holds no run; start one with: simsid train DATA -o {self.resume}")
        document = read_json(file)
        if document.get("command") != "train":
            raise UsageError(f"{self.resume} was not started by `simsid train`")
        try:
            machine = document.get("machine", {"device": "auto", "threads": 0})
            return dataclasses.replace(
                self,
                data=self.data or pathlib.Path(document["data"]),
                val_share=document["val_share"],
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


@dataclass(frozen=True)
class Evaluate:
    """Measure a model on labelled radiographs: a table, report.html and scores.csv."""

    model: Positional[ModelFolder]
    """Model or run folder."""
    data: Positional[Data]
    """Labelled images: a published data set's folder, or a CSV (path,label,split,patient)."""
    output: MaybeOutput = None
    """Folder for report.html, metrics.json and scores.csv; without it MODEL/evaluation."""
    split: Annotated[str | None, arg(metavar="NAME")] = None
    """Split to evaluate; without it test, or else val, or else everything."""
    false_alarm_rate: float = 0.05
    """Share of held-out normal films that the threshold lets alarm."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Evaluate and write; the exit status is 1 when a file could not be read."""
        from simsid import checkpoint
        from simsid.data import open_dataset
        from simsid.metrics import format_table
        from simsid.scoring import stream as scoring

        model = _calibrated_model(self.model, self.machine.prepare())
        scoring.threshold(model, self.false_alarm_rate)
        dataset = open_dataset(self.data)
        split = self.split if self.split is not None else _usual_split(dataset)
        records = dataset.select(split)
        # Before an hour of decoding.
        scoring.require_labels(record.label for record in records)
        output = _output(self.output or self.model / "evaluation")
        images = _load(records, model.config, self.machine.workers)
        evaluation = scoring.evaluate(model, images, false_alarm_rate=self.false_alarm_rate)
        rows = evaluation.rows()
        checkpoint.write_json(
            output / "metrics.json",
            {"data": str(self.data.resolve()), "split": split, "rows": [dataclasses.asdict(row) for row in rows]},
        )
        columns = ["path", "label", "finding", *evaluation.signals, "reason"]
        with _table(output / "scores.csv", columns) as write:
            for i, record in enumerate(images.records):
                write([record.path, record.label, record.finding, *(v[i] for v in evaluation.signals.values()), ""])
            for failure in images.failures:
                write([failure.path, "", "", *("" for _ in evaluation.signals), failure.reason])
        print(format_table(rows), flush=True)
        if images.failures:
            print(f"{len(images.failures)} of {len(records)} files could not be read (reasons in scores.csv)")
        title = f"simsid: {self.data.resolve().name}, {split or 'all images'}"
        with _saved(f"the figures are in {output / 'metrics.json'}"):
            _write_report(model, images, evaluation, output / "report.html", title, [], None)
        print(f"report: {output / 'report.html'}")
        return 1 if images.failures else 0


@dataclass(frozen=True)
class Score:
    """Score films: one row for each in scores.csv, the most anomalous pictured in report.html.

    Stopped or killed, the same command goes on where it was. Under torchrun, every process scores a share, and the last
    to finish writes the table. The exit status is 0 when every file was scored, 1 when some were, 2 when none was.
    """

    model: Positional[ModelFolder]
    """Model or run folder."""
    data: Positional[Data]
    """Folder of images (any depth), one image, or a CSV with a path column."""
    output: Output
    """Folder for scores.csv and report.html."""
    false_alarm_rate: float = 0.05
    """Share of held-out normal films that the threshold lets alarm."""
    pictures: int = 24
    """Most anomalous films to picture in report.html; 0 writes no report."""
    batch_size: int = 16
    """Films that pass through the network at a time."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Score every file of this rank, and merge where all ranks are through; unreadable files get a reason."""
        # Before the slow imports, during which other ranks may finish what they all had begun.
        table = self.output / "scores.csv"
        before = _version(table)
        from tqdm import tqdm

        from simsid.distributed import Rank
        from simsid.scoring import archive
        from simsid.scoring import stream as scoring

        if self.pictures < 0:
            raise UsageError(f"pictures must be at least 0, got {self.pictures}")
        rank = Rank.from_environment()
        model = _calibrated_model(self.model, self.machine.prepare(rank))
        limit = scoring.threshold(model, self.false_alarm_rate)
        work = archive.Work(
            model,
            self.data,
            self.output,
            rank,
            false_alarm_rate=self.false_alarm_rate,
            batch_size=self.batch_size,
            workers=self.machine.workers or None,
            superseded=lambda: _version(table) != before,
        )
        who = f"rank {rank.number} of {rank.count}: " if rank.count > 1 else ""
        _output(self.output)
        with work:
            if not work.begin():
                print(f"{who}all was scored already, and another rank has merged it")
                return 0
            done = work.resume()
            if done:
                print(f"{who}going on after {done} files that are done", flush=True)
            quiet = rank.number > 0 or not sys.stderr.isatty()
            try:
                for _ in tqdm(work.score(), total=work.total, initial=done, unit="film", disable=quiet):
                    done += 1
            except KeyboardInterrupt:
                print(f"{who}stopped after {done} files; the same command goes on from there", file=sys.stderr)
                return 130
            with work.finish() as missing:
                if missing:
                    print(f"{who}{done} files done; rank {', '.join(map(str, missing))} still to come")
                    return 0
                return self._merge(work, limit)

    def _merge(self, work: "Work", limit: float | None) -> int:
        """Write the table and the report; killed here, the next start writes them again."""
        table, report = self.output / "scores.csv", self.output / "report.html"
        with _table(table, work.columns) as write:
            summary = work.merge(write, self.pictures)
            # That of an earlier scoring would not fit the new scores, and not every scoring writes one.
            report.unlink(missing_ok=True)
        if summary.top:
            with _saved(f"the scores are in {table}"):
                _score_report(work.model, summary, report, self.data)
        work.remove()
        failed = f", {summary.failed} failed (reasons in scores.csv)" if summary.failed else ""
        print(f"{summary.scored} of {summary.scored + summary.failed} files scored{failed}")
        if limit is None:
            print("no threshold: the model was calibrated without held-out normal films")
        elif summary.scored:
            print(
                f"{summary.alarms} above the threshold, which {self.false_alarm_rate:.3g} of held-out normal films may "
                "exceed"
            )
        if summary.top:
            print(f"report: {report}")
        print(f"scores: {table}")
        return 0 if not summary.failed else 1 if summary.scored else 2


@dataclass(frozen=True)
class Calibrate:
    """Measure what normal films look like to a model, which scores need; converted models have none."""

    model: Positional[ModelFolder]
    """Model folder; its calibration is replaced."""
    data: Positional[Data]
    """The images the model was trained on, in any form `train` takes."""
    val_share: float = 0.1
    """Share of the training images held out where the data has too few normal validation images."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Calibrate and save."""
        from simsid.data import open_dataset
        from simsid.models.model import Model
        from simsid.training import run_folder as runs

        device = self.machine.prepare()
        model = Model.load(self.model, device=device)
        train_records, val_records = partition(open_dataset(self.data), self.val_share)
        normal = [record for record in val_records if record.label != 1]
        # A training in progress would be given back the weights that were loaded here.
        is_run = (self.model / "run.json").exists()
        with runs.RunFolder(self.model) if is_run else contextlib.nullcontext():
            train = _load(train_records, model.config, self.machine.workers)
            val = _load(normal, model.config, self.machine.workers) if normal else None
            model.calibrate(train.batches(), val.batches() if val is not None else None)
            model.save(self.model)
        held = len(val) if val is not None else 0
        print(f"{self.model}: calibrated on {len(train)} normal images, with {held} held out for thresholds")
        return 0


@dataclass(frozen=True)
class Baselines:
    """Measure two plain baselines, k-NN and PCA on pixels, on the same images as a model."""

    data: Positional[Data]
    """Labelled images in any form `train` takes."""
    split: Annotated[str | None, arg(metavar="NAME")] = None
    """Split to evaluate; without it test, or else val. `val` is what `train` validates on."""
    image_size: int = 128
    """Side of the images, pixels."""
    val_share: float = 0.1
    """As in `train`, so that both see the same images."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Fit on normal training images, print the table."""
        import numpy as np

        from simsid.data import load_images, open_dataset
        from simsid.metrics import Evaluation, format_table
        from simsid.models.baselines import BASELINES
        from simsid.scoring import stream as scoring

        self.machine.prepare()
        dataset = open_dataset(self.data)
        split = self.split or _usual_split(dataset) or "val"
        train_records, val_records = partition(dataset, self.val_share)
        test_records = val_records if split == "val" else dataset.select(split)
        scoring.require_labels(record.label for record in test_records)
        workers = self.machine.workers or None
        train, test = (
            load_images(records, self.image_size, workers=workers, progress=sys.stderr.isatty())
            for records in (train_records, test_records)
        )
        pixels = [np.concatenate([b.flatten(1).numpy() for b in images.batches()]) for images in (train, test)]
        evaluation = Evaluation(
            labels=test.labels,
            findings=test.findings,
            paths=test.paths,
            signals={name: score(*pixels) for name, score in BASELINES.items()},
            default=next(iter(BASELINES)),
            holdout=None,
        )
        print(f"{len(train)} normal images to compare with, {len(test)} of {split}")
        print(format_table(evaluation.rows()))
        return 0


@dataclass(frozen=True)
class Scan:
    """Read every image of a folder and say what is there: formats, sizes, depths, and why files are rejected."""

    data: Positional[Data]
    """Folder of images (any depth), or a CSV with a path column."""
    json: bool = False
    """Print JSON instead of text."""
    workers: int = 0
    """Threads that decode images; 0 is one a core."""

    def run(self) -> int:
        """Scan and print; the exit status is 1 when a file is rejected."""
        from simsid.data import scan

        if self.workers < 0:
            raise UsageError(f"workers must be at least 0, got {self.workers}")
        report = scan(self.data, workers=self.workers or None, progress=sys.stderr.isatty())
        print(json.dumps(report.as_dict(), indent=1) if self.json else report)
        return 1 if report.failures else 0


@dataclass(frozen=True)
class Convert:
    """Turn the released code's model.pth and discriminator.pth into a model folder."""

    generator: Positional[Annotated[pathlib.Path, arg(metavar="GENERATOR")]]
    """model.pth."""
    discriminator: Positional[Annotated[pathlib.Path, arg(metavar="DISCRIMINATOR")]]
    """discriminator.pth."""
    output: Output
    """Model folder to write."""
    memory: Literal["matrix", "queue"]
    """Whether the in-painting block's memory was trained as a matrix or a queue; the files cannot tell."""
    decoder_memory: Literal["patch", "subpatch"]
    """`subpatch` for the released configuration's decoder_memory 'V1', `patch` for 'V3'."""
    topk: int = 5
    """The released configuration's shrink_thres."""
    threshold: Literal["inclusive", "exclusive"] = "exclusive"
    """The released code keeps the items strictly above the k-th."""
    merge_levels: int = 2
    """Up blocks that work on the whole map."""
    dropout: float = 0.0
    """Dropout rate of the feed-forward part, for training on."""
    rho: float = 1.0
    """Probability of the masked shortcut, for training on; SQUID: 0.95."""
    calibrate: Annotated[pathlib.Path | None, arg(metavar="DATA")] = None
    """Training images to calibrate the model on, in any form `train` takes."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Convert, save, and calibrate where images are given."""
        from simsid.models import released

        if (self.output / "model.json").exists():
            raise UsageError(f"{self.output} already holds a model; choose another folder with -o")
        options = ("memory", "decoder_memory", "topk", "threshold", "merge_levels", "dropout", "rho")
        model = released.convert(
            released.read_released(self.generator),
            released.read_released(self.discriminator),
            **{name: getattr(self, name) for name in options},
        )
        model.save(_output(self.output))
        config = model.config
        print(
            f"{self.output}: {config.image_size} pixels, {config.patches} x {config.patches} patches, "
            f"width {config.width}, {config.levels} levels, {config.items} and {config.decoder_items} items"
        )
        if self.calibrate is None:
            print(f"scores need a calibration: simsid calibrate {self.output} FOLDER")
            return 0
        return Calibrate(self.output, self.calibrate, machine=self.machine).run()


@dataclass(frozen=True)
class Doctor:
    """Say which versions, GPU, decoders and kernels there are, and the one command that mends each gap."""

    def run(self) -> int:
        """Print the findings; the exit status is 1 when something that simsid needs is missing."""
        from simsid.doctor import examine

        findings = examine()
        width = max(len(finding.subject) for finding in findings)
        for finding in findings:
            print(f"{finding.mark:<5}{finding.subject:<{width}}  {finding.text}")
            if finding.remedy:
                print(f"{'':<5}{'':<{width}}  -> {finding.remedy}")
        return 1 if any(finding.mark == "FAIL" for finding in findings) else 0


COMMANDS: dict[str, type] = {
    "demo": Demo,
    "train": Train,
    "evaluate": Evaluate,
    "score": Score,
    "calibrate": Calibrate,
    "baselines": Baselines,
    "scan": Scan,
    "convert": Convert,
    "doctor": Doctor,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status: 0 done, 1 in part, 2 not at all, 130 stopped by Ctrl-C."""
    try:
        # File names may hold bytes that are no text, and a terminal may lack a character.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"simsid: note: {message}", file=sys.stderr)
            status = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has gone, as with `| head`; Python would complain once more when it flushes.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.dup2(nowhere, sys.stderr.fileno())
        status = 141
    sys.exit(status)


def _run(arguments: list[str]) -> int | str | None:
    if arguments == ["--version"]:
        from simsid import __version__

        print(f"simsid {__version__}")
        return 0
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    who = f"rank {os.environ.get('RANK')}: " if several else ""
    try:
        command = _parse(arguments)
        if several and not isinstance(command, (Train, Score)):
            raise UsageError(f"{arguments[0]} runs as one process; start it without torchrun")
        return command.run()
    except SystemExit as stop:
        return stop.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        raise
    except IncompleteError as error:
        print(f"simsid: {who}{error}", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, ArithmeticError, OSError) as error:
        if several and _lost_the_others(error):
            print(f"simsid: {who}the connection to the other processes is lost", file=sys.stderr)
            return 2
        if not _expected(error):
            raise
        print(f"simsid: {who}{_sentence(error)}", file=sys.stderr)
        return 2


def partition(dataset: "Dataset", val_share: float) -> "tuple[list[Record], list[Record]]":
    """See `simsid.data.partition`; imported when called, because it needs PyTorch."""
    from simsid import data

    return data.partition(dataset, val_share)


def _parse(arguments: list[str]) -> object:
    """Read a command's options; a preset or ablation sets the defaults of the model's options, so it is read first."""
    known = {name: subcommand(name, prefix_name=False) for name in COMMANDS}
    if arguments[:1] == ["train"]:
        _check_resume(arguments[1:])
        preset, ablation = _option(arguments, "preset"), _option(arguments, "ablation")
        if ablation in ABLATIONS:
            model = Config.ablation(ablation)
        else:
            model = PRESETS[preset]() if preset in PRESETS else Config()
        known["train"] = subcommand("train", prefix_name=False, default=Train(model=model))
    union = None
    for name, kind in COMMANDS.items():
        option = Annotated[kind, known[name]]
        union = option if union is None else union | option
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                union, prog="simsid", description=f"{sys.modules['simsid'].__doc__}\n\n{RESEARCH}", args=arguments
            )
    except SystemExit as stop:
        # The parser frames what a configuration says about itself, and names its own internals there.
        cause = stop.__context__
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(said.getvalue())
        raise


def _option(arguments: list[str], name: str) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == f"--{name}" and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"--{name}="):
            return argument.split("=", 1)[1]
    return None


def _check_resume(arguments: list[str]) -> None:
    """Refuse options that a resumed run would not heed."""
    names = [found[1].replace("_", "-") for found in map(re.compile(r"--?([a-zA-Z][\w-]*)").match, arguments) if found]
    ignored = [name for name in names if name not in RESUMABLE and name != "h"]
    if "resume" in names and ignored:
        listed = ", ".join(f"--{name}" if len(name) > 1 else f"-{name}" for name in ignored)
        raise UsageError(f"--resume continues a run with the options it was started with; leave out {listed}")


def _expected(error: Exception) -> bool:
    """Whether an error is one that simsid (or the file system) raises about its input, and not a defect."""
    return isinstance(error, OSError) or type(error).__module__.startswith("simsid.") or _raised_by_simsid(error)


def _lost_the_others(error: Exception) -> bool:
    """Whether a collective failed because another process is gone; PyTorch has no type of its own for gloo's errors."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def _raised_by_simsid(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("simsid.")


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _model(config: Config, seed: int, device: str) -> "Model":
    import torch

    from simsid.models.model import Model

    torch.manual_seed(seed)
    return Model(config).to(device)


def _calibrated_model(path: pathlib.Path, device: str) -> "Model":
    from simsid.models.model import Model

    model = Model.load(path, device=device)
    if model.calibration is None:
        raise UsageError(
            f"{path} is not calibrated, which scores need: finish its training, or run simsid calibrate {path} DATA "
            f"with the images it was trained on"
        )
    return model


def _request(command: str, config: Config, training: TrainingConfig, extra: dict[str, object]) -> dict[str, object]:
    return {"command": command, "model": config.to_dict(), "training": training.to_dict(), **extra}


def _usual_split(dataset: "Dataset") -> str | None:
    splits = {record.split for record in dataset.records}
    return next((name for name in ("test", "val") if name in splits), None)


def _load(records: "list[Record]", config: Config, workers: int, team: "Team | None" = None) -> "ImageSet":
    """Load images; the members of a team decode a share each."""
    from simsid.data import load_images
    from simsid.distributed import Team

    team = team or Team()
    return load_images(
        records,
        config.image_size,
        aspect=config.aspect,
        intensity=config.intensity,
        workers=workers or None,
        progress=team.main and sys.stderr.isatty(),
        decode=team.in_order,
    )


def _summary(train: "ImageSet", val: "ImageSet | None", failed: int) -> str:
    """Say what is trained on, so that a folder of mixed films is noticed."""
    unlabelled = int((train.labels < 0).sum())
    abnormal = int((val.labels == 1).sum()) if val is not None else 0
    normal = len(val) - abnormal if val is not None else 0
    parts = [
        f"training on {len(train)} images" + (f" ({unlabelled} without a label, taken as normal)" if unlabelled else "")
    ]
    parts.append(f"validating on {normal} normal and {abnormal} abnormal")
    return ", ".join(parts) + (f"; {failed} files could not be read (failures.csv)" if failed else "")


def _write_report(
    model: "Model",
    images: "ImageSet",
    evaluation: "Evaluation",
    path: pathlib.Path,
    title: str,
    notes: list[str],
    training: TrainingConfig | None,
) -> None:
    from simsid.report import page as report
    from simsid.scoring import stream as scoring
    from simsid.training import run_folder as runs

    shown = evaluation.signals[evaluation.default]
    configuration = {"model": model.config.to_dict()}
    if training is not None:
        configuration["training"] = training.to_dict()
    report.write_report(
        path,
        title=title,
        evaluation=evaluation,
        examples=scoring.examples(model, images, shown, scoring.typical_places(evaluation)),
        configuration=configuration,
        versions=runs.versions(),
        notes=notes,
    )


def _score_report(model: "Model", summary: "Summary", report: pathlib.Path, data: pathlib.Path) -> None:
    from simsid.report.page import write_report
    from simsid.scoring import stream as scoring
    from simsid.training import run_folder as runs

    count = len(summary.top)
    write_report(
        report,
        title=f"simsid: {data.resolve().name}",
        evaluation=None,
        examples=scoring.examples_of_files(model, summary.top, count),
        configuration={"model": model.config.to_dict()},
        versions=runs.versions(),
        notes=[
            f"{summary.scored} films scored, {summary.failed} not; the {count} with the highest {model.signal} are "
            "shown.",
            "The score is standardised on normal training films: 0.5 is an average normal film, 1 is anomalous.",
        ],
    )


def _version(path: pathlib.Path) -> tuple[int, int] | None:
    """Tell a file from one that replaces it; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _output(path: pathlib.Path) -> pathlib.Path:
    if path.exists() and not path.is_dir():
        raise UsageError(f"the output must be a folder, got the file {path}")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _check_replaceable(path: pathlib.Path, command: str) -> None:
    """Refuse a folder that holds anything but an earlier run of the same command."""
    from simsid.checkpoint import read_json

    if path.is_dir():
        if (path / "run.json").exists():
            if read_json(path / "run.json").get("command") != command:
                raise UsageError(f"{path} holds another run; choose another folder with -o")
        elif any(not entry.name.startswith((".lock", ".run.json.")) for entry in path.iterdir()):
            raise UsageError(f"{path} is not empty; choose another folder with -o")


def _clear_run(path: pathlib.Path) -> None:
    from simsid.training.run_folder import WRITTEN

    # The request goes last: a folder without it is refused the next time.
    for pattern in (*(name for name in WRITTEN if name != "run.json"), "report.html", "run.json"):
        for file in path.glob(pattern):
            file.unlink()


@contextlib.contextmanager
def _saved(what: str) -> "Iterator[None]":
    """Let no error in what follows hide that the result itself is there."""
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        raise IncompleteError(f"{what}, but writing the report failed: {type(error).__name__}: {error}") from error


def _table(path: pathlib.Path, columns: list[str]) -> "contextlib.AbstractContextManager[Callable[..., object]]":
    from simsid import checkpoint

    return checkpoint.csv_writer(path, columns)

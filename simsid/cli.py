"""The command line: each command is a dataclass whose fields are its options."""

import contextlib
import csv
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand

from simsid.config import ABLATIONS, PRESETS, Config, TrainingConfig

if TYPE_CHECKING:
    from simsid.data import Dataset, ImageSet, Record
    from simsid.metrics import Evaluation
    from simsid.model import Model

FEWEST_HELD_OUT = 50
"""With fewer normal validation images than this, some training images are held out beside them."""

RESEARCH = "For research use only; not a medical device."


class UsageError(ValueError):
    """A request that makes no sense; the message says what would."""


@dataclass(frozen=True)
class Machine:
    """Options of every command that computes."""

    device: str = "auto"
    """Where to compute: auto, cpu, cuda or cuda:1."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to PyTorch."""
    workers: int = 0
    """Threads that decode images; 0 is one a core."""

    def prepare(self) -> str:
        """Set the threads and return the device."""
        import torch

        if self.threads < 0 or self.workers < 0:
            raise UsageError(f"threads and workers must be at least 0, got {self.threads} and {self.workers}")
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        try:
            kind = torch.device(self.device).type
        except RuntimeError:
            kind = ""
        if kind not in ("cpu", "cuda"):
            raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        if kind == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"device {self.device} was asked for, but PyTorch sees no GPU; see `simsid doctor`")
        return self.device


@dataclass(frozen=True)
class Demo:
    """Train on DigitAnatomy and report: no download, no GPU, a few minutes on two cores."""

    output: Annotated[pathlib.Path, arg(aliases=["-o"])] = pathlib.Path("simsid-demo")
    """Folder for the trained model and report.html; an earlier demo there is replaced."""
    epochs: int = 8
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
        import torch

        from simsid import demo, runs
        from simsid.metrics import format_table

        device = self.machine.prepare()
        data = demo.data(self.seed, self.images, self.mnist)
        config, training = Config.digit_anatomy(), demo.training(self.epochs, self.seed)
        with runs.RunFolder(self.output) as folder:
            _clear_run(folder.path, "demo")
            _start(folder, "demo", config, training, {"images": self.images, "seed": self.seed})
            train, val, test = (data.load(split, config.image_size) for split in ("train", "val", "test"))
            print(f"DigitAnatomy: {len(train)} normal images to train on; {len(val)} to validate, {len(test)} to test")
            torch.manual_seed(self.seed)
            model = _model(config, device)
            history = _fit(model, training, folder, train, val)
            if history.interrupted:
                print("stopped; run the demo again to start anew", file=sys.stderr)
                return 130
            evaluation = _evaluate(
                model, test, self.output / "report.html", "simsid demo: DigitAnatomy", demo.NOTES, training
            )
        print(format_table(evaluation.rows()))
        print(f"report: {self.output / 'report.html'}    model: simsid score {self.output} FOLDER -o DIR")
        return 0


@dataclass(frozen=True)
class Train:
    """Train a model on a folder or list of radiographs, normal ones only."""

    data: Positional[pathlib.Path | None] = None
    """ZhangLab's, CheXpert's or COVIDx's folder as published, any folder of normal images, or a CSV (path,label,split,
    patient)."""
    output: Annotated[pathlib.Path | None, arg(aliases=["-o"])] = None
    """Run folder; without it runs/NAME-PRESET."""
    resume: pathlib.Path | None = None
    """Continue the run in this folder, with the options it was started with."""
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
        import torch

        from simsid import data as simsid_data
        from simsid import runs
        from simsid.metrics import format_table

        device = self.machine.prepare()
        request = self._resumed() if self.resume else self
        if request.data is None:
            raise UsageError("train needs a folder or CSV of images, or --resume RUN")
        path = self.resume or request.output or pathlib.Path("runs") / f"{request.data.resolve().stem}-{request.name}"
        with runs.RunFolder(path) as folder:
            if not self.resume and (folder.path / "run.json").exists():
                raise runs.RunError(
                    f"{path} already holds a run; continue it with --resume {path}, or choose another -o"
                )
            dataset = simsid_data.open_dataset(request.data)
            train_records, val_records = partition(dataset, request.val_share)
            if not self.resume:
                extra = {"data": str(request.data.resolve()), "val_share": request.val_share}
                _start(folder, "train", request.model, request.training, extra)
                folder.write_manifest([*train_records, *val_records])
            train, val = (_load(records, request.model, self.machine) for records in (train_records, val_records))
            _write_failures(folder.path / "failures.csv", [*train.failures, *val.failures])
            print(_summary(train, val))
            torch.manual_seed(request.training.seed)
            model = _model(request.model, device)
            history = _fit(model, request.training, folder, train, val, resume=folder.started)
            if history.interrupted:
                print(f"stopped; continue with: simsid train --resume {path}", file=sys.stderr)
                return 130
            if set(val.labels) >= {0, 1}:
                title = f"simsid: {request.data.resolve().name}, validation"
                notes = ["These images chose the epoch that was kept: the figures are optimistic."]
                report = folder.path / "report.html"
                evaluation = _evaluate(model, val, report, title, notes, request.training)
                print(format_table(evaluation.rows()))
                print(f"report: {report}")
        print(f"kept epoch {history.best_epoch + 1}; use it with: simsid score {path} FOLDER -o DIR")
        return 0

    @property
    def name(self) -> str:
        """The configuration's name."""
        return self.ablation or self.preset

    def _resumed(self) -> "Train":
        from simsid.checkpoint import CheckpointError, read_json

        document = read_json(self.resume / "run.json")
        if document.get("command") != "train":
            raise CheckpointError(f"{self.resume}/run.json was not written by `simsid train`")
        try:
            return dataclasses.replace(
                self,
                data=pathlib.Path(document["data"]),
                val_share=document["val_share"],
                model=Config.from_dict(document["model"]),
                training=TrainingConfig.from_dict(document["training"]),
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{self.resume}/run.json is not a run's request: {error}") from None


@dataclass(frozen=True)
class Evaluate:
    """Measure a model on labelled radiographs: a table, report.html and scores.csv."""

    model: Positional[pathlib.Path]
    """Model or run folder."""
    data: Positional[pathlib.Path]
    """Labelled images: a published data set's folder, or a CSV (path,label,split,patient)."""
    output: Annotated[pathlib.Path | None, arg(aliases=["-o"])] = None
    """Folder for report.html, metrics.json and scores.csv; without it MODEL/evaluation."""
    split: str | None = None
    """Split to evaluate; without it test, or else val, or else everything."""
    false_alarm_rate: float = 0.05
    """Share of held-out normal films that the threshold lets alarm."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Evaluate and write."""
        from simsid import checkpoint
        from simsid.data import open_dataset
        from simsid.metrics import format_table
        from simsid.model import Model

        device = self.machine.prepare()
        model = Model.load(self.model, device=device)
        dataset = open_dataset(self.data)
        splits = {record.split for record in dataset.records}
        split = (
            self.split if self.split is not None else next((name for name in ("test", "val") if name in splits), None)
        )
        images = _load(dataset.select(split), model.config, self.machine)
        output = _output(self.output or self.model / "evaluation")
        title = f"simsid: {self.data.resolve().name}, {split or 'all images'}"
        evaluation = _evaluate(
            model, images, output / "report.html", title, [], None, false_alarm_rate=self.false_alarm_rate
        )
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
        print(format_table(rows))
        print(f"report: {output / 'report.html'}")
        return 1 if images.failures else 0


@dataclass(frozen=True)
class Score:
    """Score films: one row for each in scores.csv, the most anomalous pictured in report.html.

    The exit status is 0 when every file was scored, 1 when some were, 2 when none was.
    """

    model: Positional[pathlib.Path]
    """Model or run folder."""
    data: Positional[pathlib.Path]
    """Folder of images (any depth), one image, or a CSV with a path column."""
    output: Annotated[pathlib.Path, arg(aliases=["-o"])]
    """Folder for scores.csv and report.html."""
    false_alarm_rate: float = 0.05
    """Share of held-out normal films that the threshold lets alarm."""
    pictures: int = 24
    """Most anomalous films to picture in report.html; 0 writes no report."""
    batch_size: int = 16
    """Films that pass through the network at a time."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Score every file; unreadable ones get a row with the reason."""
        import heapq

        from tqdm import tqdm

        from simsid import scoring
        from simsid.data import Radiographs, open_dataset
        from simsid.model import Model

        device = self.machine.prepare()
        model = Model.load(self.model, device=device)
        files = (Radiographs if self.data.is_dir() else open_dataset)(self.data).records
        output = _output(self.output)
        limit = scoring.threshold(model, self.false_alarm_rate)
        scores = scoring.score_files(
            model,
            files,
            false_alarm_rate=self.false_alarm_rate,
            batch_size=self.batch_size,
            workers=self.machine.workers or None,
        )
        scored, alarms, top = 0, 0, []
        with _table(output / "scores.csv", ["path", "score", "alarm", *model.signal_names, "reason"]) as write:
            for place, row in enumerate(tqdm(scores, total=len(files), unit="film", disable=not sys.stderr.isatty())):
                alarm = "" if row.alarm is None else int(row.alarm)
                values = [row.signals.get(name, "") for name in model.signal_names]
                write([row.path, "" if row.score is None else row.score, alarm, *values, row.reason])
                if not row.reason:
                    scored, alarms = scored + 1, alarms + bool(row.alarm)
                    heapq.heappush(top, (row.signals[model.signal], -place, row))
                    if len(top) > self.pictures:
                        heapq.heappop(top)
        failed = len(files) - scored
        print(
            f"{scored} of {len(files)} files scored" + (f", {failed} failed (reasons in scores.csv)" if failed else "")
        )
        if limit is None:
            print("no threshold: the model was calibrated without held-out normal films")
        elif scored:
            print(f"{alarms} above the threshold for {self.false_alarm_rate:.0%} false alarms on normal films")
        if top and self.pictures:
            _score_report(model, [row for _, _, row in top], output / "report.html", self.data, scored, failed)
            print(f"report: {output / 'report.html'}")
        print(f"scores: {output / 'scores.csv'}")
        return 0 if not failed else 1 if scored else 2


@dataclass(frozen=True)
class Calibrate:
    """Measure what normal films look like to a model, which scores need; converted models have none."""

    model: Positional[pathlib.Path]
    """Model folder; its calibration is replaced."""
    data: Positional[pathlib.Path]
    """The images the model was trained on, in any form `train` takes."""
    val_share: float = 0.1
    """Share of the training images held out where the data has too few normal validation images."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Calibrate and save."""
        from simsid.data import open_dataset
        from simsid.model import Model

        device = self.machine.prepare()
        model = Model.load(self.model, device=device)
        train_records, val_records = partition(open_dataset(self.data), self.val_share)
        normal = [record for record in val_records if record.label != 1]
        train, val = (_load(records, model.config, self.machine) for records in (train_records, normal))
        model.calibrate(train.batches(), val.batches())
        model.save(self.model)
        print(f"{self.model}: calibrated on {len(train)} normal images, with {len(val)} held out for thresholds")
        return 0


@dataclass(frozen=True)
class Baselines:
    """Measure two plain baselines, k-NN and PCA on pixels, on the same images as a model."""

    data: Positional[pathlib.Path]
    """Labelled images in any form `train` takes."""
    split: str | None = None
    """Split to evaluate; without it test, or else val."""
    image_size: int = 128
    """Side of the images, pixels."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Fit on normal training images, print the table."""
        import numpy as np

        from simsid.baselines import BASELINES
        from simsid.data import load_images, open_dataset
        from simsid.metrics import Evaluation, format_table

        dataset = open_dataset(self.data)
        splits = {record.split for record in dataset.records}
        split = self.split or next((name for name in ("test", "val") if name in splits), None)
        if split is None:
            raise UsageError(f"{self.data} has no test or val split to evaluate on")
        normal = [record for record in dataset.select("train") if record.label != 1]
        if not normal:
            raise UsageError(f"{self.data} has no normal training image")
        workers = self.machine.workers or None
        train, test = (
            load_images(records, self.image_size, workers=workers) for records in (normal, dataset.select(split))
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
        print(format_table(evaluation.rows()))
        return 0


@dataclass(frozen=True)
class Scan:
    """Read every image of a folder and say what is there: formats, sizes, depths, and why files are rejected."""

    data: Positional[pathlib.Path]
    """Folder of images (any depth), or a CSV with a path column."""
    json: bool = False
    """Print JSON instead of text."""
    workers: int = 0
    """Threads that decode images; 0 is one a core."""

    def run(self) -> int:
        """Scan and print; the exit status is 1 when a file is rejected."""
        from simsid.data import scan

        report = scan(self.data, workers=self.workers or None, progress=sys.stderr.isatty())
        print(json.dumps(report.as_dict(), indent=1) if self.json else report)
        return 1 if report.failures else 0


@dataclass(frozen=True)
class Convert:
    """Turn the released code's model.pth and discriminator.pth into a model folder."""

    generator: Positional[pathlib.Path]
    """model.pth."""
    discriminator: Positional[pathlib.Path]
    """discriminator.pth."""
    output: Annotated[pathlib.Path, arg(aliases=["-o"])]
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
    calibrate: pathlib.Path | None = None
    """Training images to calibrate the model on, in any form `train` takes."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Convert, save, and calibrate where images are given."""
        from simsid import released

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
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        from simsid import __version__

        print(f"simsid {__version__}")
        sys.exit(0)
    try:
        sys.exit(_parse(arguments).run())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone, as with `| head`; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, RuntimeError, ArithmeticError, OSError) as error:
        if not _expected(error):
            raise
        print(f"simsid: {_sentence(error)}", file=sys.stderr)
        sys.exit(2)


def partition(dataset: "Dataset", val_share: float) -> "tuple[list[Record], list[Record]]":
    """Choose the images to train on, normal ones only, and those to validate on.

    A data set's own splits are kept. Where fewer than 50 normal images are there to validate on, `val_share` of the
    normal training images is held out beside them, patients kept apart.
    """
    from simsid.data import split_by_patient

    if not 0 < val_share < 1:
        raise UsageError(f"val_share must be between 0 and 1, got {val_share}")
    train = [record for record in dataset.records if record.split in ("", "train") and record.label != 1]
    val = [record for record in dataset.records if record.split == "val"]
    if not train:
        raise UsageError(f"{dataset.name} has no normal image to train on")
    if sum(record.label != 1 for record in val) < FEWEST_HELD_OUT:
        train = split_by_patient([dataclasses.replace(record, split="") for record in train], val_share)
        val += [record for record in train if record.split == "val"]
        # Anomalies without a split are of no use for training; they help to validate.
        val += [record for record in dataset.records if record.split == "" and record.label == 1]
    train = [dataclasses.replace(record, split="train") for record in train if record.split != "val"]
    return train, [dataclasses.replace(record, split="val") for record in val]


def _parse(arguments: list[str]) -> object:
    """Read a command's options; a preset or ablation sets the defaults of the model's options, so it is read first."""
    known = {name: subcommand(name, prefix_name=False) for name in COMMANDS}
    if arguments[:1] == ["train"]:
        preset, ablation = _option(arguments, "preset"), _option(arguments, "ablation")
        if ablation is not None:
            model = Config.ablation(ablation)
        else:
            model = PRESETS[preset]() if preset in PRESETS else Config()
        known["train"] = subcommand("train", prefix_name=False, default=Train(model=model))
    union = None
    for name, kind in COMMANDS.items():
        option = Annotated[kind, known[name]]
        union = option if union is None else union | option
    return tyro.cli(union, prog="simsid", description=f"{sys.modules['simsid'].__doc__}\n\n{RESEARCH}", args=arguments)


def _option(arguments: list[str], name: str) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == f"--{name}" and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"--{name}="):
            return argument.split("=", 1)[1]
    return None


def _expected(error: Exception) -> bool:
    """Whether an error is one that simsid (or the file system) raises about its input, and not a defect."""
    return isinstance(error, OSError) or type(error).__module__.startswith("simsid.") or _raised_by_simsid(error)


def _raised_by_simsid(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("simsid.")


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _model(config: Config, device: str) -> "Model":
    from simsid.model import Model

    return Model(config).to(device)


def _start(folder: object, command: str, config: Config, training: TrainingConfig, extra: dict[str, object]) -> None:
    document = {"command": command, "model": config.to_dict(), "training": training.to_dict(), **extra}
    folder.write_request(document)


def _fit(
    model: "Model",
    training: TrainingConfig,
    folder: object,
    train: "ImageSet",
    val: "ImageSet",
    *,
    resume: bool = False,
) -> object:
    from simsid.training import Trainer

    trainer = Trainer(model, training, run=folder, progress=True)
    return trainer.fit(train, val if len(val) else None, resume=resume)


def _load(records: "list[Record]", config: Config, machine: Machine) -> "ImageSet":
    from simsid.data import load_images

    return load_images(
        records,
        config.image_size,
        aspect=config.aspect,
        intensity=config.intensity,
        workers=machine.workers or None,
        progress=sys.stderr.isatty(),
    )


def _summary(train: "ImageSet", val: "ImageSet") -> str:
    """Say what is trained on, so that a folder of mixed films is noticed."""
    unlabelled = int((train.labels < 0).sum())
    parts = [
        f"training on {len(train)} images" + (f" ({unlabelled} without a label, taken as normal)" if unlabelled else "")
    ]
    parts.append(f"validating on {int((val.labels != 1).sum())} normal and {int((val.labels == 1).sum())} abnormal")
    failed = len(train.failures) + len(val.failures)
    return ", ".join(parts) + (f"; {failed} files could not be read (failures.csv)" if failed else "")


def _evaluate(
    model: "Model",
    images: "ImageSet",
    report: pathlib.Path,
    title: str,
    notes: list[str],
    training: TrainingConfig | None,
    *,
    false_alarm_rate: float = 0.05,
) -> "Evaluation":
    from simsid import runs, scoring
    from simsid.report import write_report

    evaluation = scoring.evaluate(model, images, false_alarm_rate=false_alarm_rate)
    shown = evaluation.signals[evaluation.default]
    configuration = {"model": model.config.to_dict()}
    if training is not None:
        configuration["training"] = training.to_dict()
    write_report(
        report,
        title=title,
        evaluation=evaluation,
        examples=scoring.examples(model, images, shown, scoring.typical_places(evaluation)),
        configuration=configuration,
        versions=runs.versions(),
        notes=notes,
    )
    return evaluation


def _score_report(
    model: "Model", rows: list, report: pathlib.Path, data: pathlib.Path, scored: int, failed: int
) -> None:
    from simsid import runs, scoring
    from simsid.report import write_report

    write_report(
        report,
        title=f"simsid: {data.resolve().name}",
        evaluation=None,
        examples=scoring.examples_of_files(model, rows, len(rows)),
        configuration={"model": model.config.to_dict()},
        versions=runs.versions(),
        notes=[
            f"{scored} films scored, {failed} not; the {len(rows)} with the highest {model.signal} are shown.",
            "The score is standardised on normal training films: 0.5 is an average normal film, 1 is anomalous.",
        ],
    )


def _output(path: pathlib.Path) -> pathlib.Path:
    if path.exists() and not path.is_dir():
        raise UsageError(f"the output must be a folder, got the file {path}")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _clear_run(path: pathlib.Path, command: str) -> None:
    """Remove an earlier run of the same command; anything else that lies there is left alone and refused."""
    from simsid.checkpoint import read_json

    if (path / "run.json").exists():
        if read_json(path / "run.json").get("command") != command:
            raise UsageError(f"{path} holds another run; choose another folder with -o")
        for pattern in (
            "run.json",
            "last.json",
            "last-*.safetensors",
            "model.json",
            "model-*.safetensors",
            "report.html",
        ):
            for file in path.glob(pattern):
                file.unlink()
    elif [entry for entry in path.iterdir() if entry.name != ".lock"]:
        raise UsageError(f"{path} is not empty; choose another folder with -o")


def _write_failures(path: pathlib.Path, failures: list) -> None:
    if failures:
        with _table(path, ["path", "reason"]) as write:
            for failure in failures:
                write([failure.path, failure.reason])


@contextlib.contextmanager
def _table(path: pathlib.Path, columns: list[str]) -> "Iterator[callable]":
    """Write a CSV row by row beside its place; it takes its place when it is whole."""
    temporary = path.with_name(f".{path.name}.part")
    with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        yield writer.writerow
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


if __name__ == "__main__":
    main()

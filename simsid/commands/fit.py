"""`simsid train` for models that are fitted in one pass over the images: baselines, feature memories."""

import contextlib
import dataclasses
import pathlib
import shlex
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from simsid.commands.common import Exclude, Machine, MaybeOutput, PrecisionName
from simsid.commands.train import load_both, report_loaded, report_validation, split
from simsid.config import PresetName
from simsid.errors import UsageError

if TYPE_CHECKING:
    from simsid.data import Record
    from simsid.distributed import ProcessGroup


@dataclass(frozen=True)
class Fit:
    """Fit a model on a folder or list of radiographs, normal ones only."""

    data: Positional[Annotated[pathlib.Path | None, arg(metavar="DATA")]] = None
    """ZhangLab's, CheXpert's or COVIDx's folder as published, any folder of normal images, or a CSV (path,label,split,
    patient)."""
    output: MaybeOutput = None
    """Model folder; without it runs/NAME-PRESET."""
    preset: PresetName = "simsid"
    """Model to fit; the model options below are its own."""
    val_share: float = 0.1
    """Fraction of the training images held out where the data has too few normal validation images."""
    exclude: Exclude = ()
    """Files to leave out, as patterns of their path below the folder, such as masks/*."""

    precision: PrecisionName = "auto"
    """Arithmetic of a feature memory's encoder; auto is float32. The fitted model keeps it."""

    def run(self) -> int:
        """Fit, save, and report on the validation images where they are labelled."""
        from simsid.distributed import ProcessGroup

        group = ProcessGroup.from_environment()
        device = self.machine.prepare(group)  # type: ignore[attr-defined]  # a field that `fit_command` adds
        with group.joined(device):
            return self._fit(device, group)

    def _fit(self, device: str, group: "ProcessGroup") -> int:
        from simsid.models.presets import seeded_model
        from simsid.precision import check_precision
        from simsid.training.run_folder import fit_in_folder, open_run

        data = self.data
        if data is None:
            raise UsageError("train needs a folder or CSV of images")
        machine, config = self.machine, self.model  # type: ignore[attr-defined]  # fields that `fit_command` adds
        path = self.output or pathlib.Path("runs") / f"{data.resolve().stem}-{self.preset}"
        train_records, val_records = group.broadcast(lambda: split(data, self))
        train_records, left_out = _sampled(train_records, config)
        model = seeded_model(self.preset, config, getattr(config, "seed", 0), device)
        model.precision = check_precision(self.precision, model.precisions)
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(open_run(path, self._document(data, config))) if group.main else None
            train, val = load_both(train_records, val_records, model, machine.workers or group.cpu_threads(), group)
            if folder is not None:
                report_loaded(path, train, val)
                if left_out:
                    print(f"a uniform sample: {left_out} further images are not read (--most-images)", flush=True)
            fit_in_folder(model, folder, train, val, progress=True, group=group)
            if folder is not None:
                print(f"use it with: simsid score {shlex.quote(str(path))} FOLDER -o DIR", flush=True)
                title = f"simsid: {data.resolve().name}, validation"
                report_validation(model, val, path, title, [], {})
        return 0

    def _document(self, data: pathlib.Path, config: Any) -> dict[str, object]:
        """Return what run.json keeps of the request."""
        return {
            "command": "fit",
            "preset": self.preset,
            "model": dataclasses.asdict(config),
            "data": str(data.resolve()),
            "val_share": self.val_share,
            "exclude": list(self.exclude),
        }


def _sampled(records: "list[Record]", config: Any) -> "tuple[list[Record], int]":
    """Return the images that a model takes at most, a uniform sample in their order, and the number of the others.

    Otherwise a hundred thousand images would be decoded and held in memory, of which a feature memory fits a few.
    """
    import random

    most = getattr(config, "most_images", len(records))
    if len(records) <= most:
        return records, 0
    chosen = sorted(random.Random(config.seed).sample(range(len(records)), most))
    return [records[i] for i in chosen], len(records) - most


@cache
def fit_command(config_type: type) -> type:
    """Return the command whose model options are the fields of a configuration class."""
    added: list[Any] = [
        ("model", OmitArgPrefixes[config_type], dataclasses.field(default_factory=config_type)),  # type: ignore[valid-type,misc]
        ("machine", OmitArgPrefixes[Machine], dataclasses.field(default_factory=Machine)),
    ]
    return dataclasses.make_dataclass("Fit", added, bases=(Fit,), frozen=True, namespace={"__doc__": Fit.__doc__})

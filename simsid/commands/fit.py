"""`simsid train` for models that are fitted in one pass over the images: baselines, feature memories."""

import dataclasses
import pathlib
import shlex
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from simsid.commands.common import Exclude, Machine, MaybeOutput
from simsid.commands.train import load_both, report_loaded, report_validation, split
from simsid.config import PresetName
from simsid.errors import UsageError


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

    def run(self) -> int:
        """Fit, save, and report on the validation images where they are labelled."""
        from simsid.models.presets import seeded_model
        from simsid.training.run_folder import fit_in_folder, open_run

        if self.data is None:
            raise UsageError("train needs a folder or CSV of images")
        machine, config = self.machine, self.model  # type: ignore[attr-defined]  # fields that `fit_command` adds
        device = machine.prepare()
        path = self.output or pathlib.Path("runs") / f"{self.data.resolve().stem}-{self.preset}"
        train_records, val_records = split(self.data, self)
        document: dict[str, object] = {
            "command": "fit",
            "preset": self.preset,
            "model": dataclasses.asdict(config),
            "data": str(self.data.resolve()),
            "val_share": self.val_share,
            "exclude": list(self.exclude),
        }
        model = seeded_model(self.preset, config, getattr(config, "seed", 0), device)
        with open_run(path, document) as folder:
            train, val = load_both(train_records, val_records, model, machine.workers)
            report_loaded(path, train, val)
            fit_in_folder(model, folder, train, val, progress=True)
            print(f"use it with: simsid score {shlex.quote(str(path))} FOLDER -o DIR", flush=True)
            title = f"simsid: {self.data.resolve().name}, validation"
            report_validation(model, val, path, title, [], {})
        return 0


@cache
def fit_command(config_type: type) -> type:
    """Return the command whose model options are the fields of a configuration class."""
    added: list[Any] = [
        ("model", OmitArgPrefixes[config_type], dataclasses.field(default_factory=config_type)),  # type: ignore[valid-type,misc]
        ("machine", OmitArgPrefixes[Machine], dataclasses.field(default_factory=Machine)),
    ]
    return dataclasses.make_dataclass("Fit", added, bases=(Fit,), frozen=True, namespace={"__doc__": Fit.__doc__})

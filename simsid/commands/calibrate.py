"""`simsid calibrate`."""

import contextlib
import math
import pathlib
import shlex
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tyro.conf import OmitArgPrefixes

from simsid.commands.common import (
    Data,
    Exclude,
    Machine,
    MaybeOutput,
    ModelFolder,
    PrecisionName,
    check_images,
    load_set,
    output_folder,
)
from simsid.errors import UsageError, printable

if TYPE_CHECKING:
    from simsid.models import AnomalyModel


FEWEST = 3
"""Normal images that a calibration on local images needs."""

FALSE_POSITIVES = 20
"""Expected number of flagged calibration images from which the rate is known to about half of itself."""


@dataclass(frozen=True)
class Calibrate:
    """Measure on normal images what a model's scores and threshold rest on; without -o the model's are replaced.

    With --local, DATA holds normal images of the place where the model will be used, none of which it was trained on:
    all of them set the statistics and the threshold. Otherwise DATA is what the model was trained on.
    """

    model: ModelFolder
    """Model folder."""
    data: Data
    """Normal images, in any form `train` takes; images with the label abnormal are left out."""
    output: MaybeOutput = None
    """Folder for the calibrated model; without it MODEL, which must not be one that comes with simsid."""
    local: bool = False
    """Calibrate on all normal images of DATA."""
    false_positive_rate: float = 0.05
    """Share of normal images that the threshold may flag; printed, and chosen again when scoring."""
    val_share: float = 0.1
    """Without --local: fraction of the training images held out where DATA has too few normal validation images."""
    exclude: Exclude = ()
    """Files to leave out, as patterns of their path below the folder, such as masks/*."""
    precision: PrecisionName = "auto"
    """Arithmetic of the scores from now on; auto is float32. bfloat16 is faster, and changes small differences."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Calibrate, save and print the threshold with its interval."""
        from simsid.data import open_dataset, partition
        from simsid.metrics import check_rate
        from simsid.models import load
        from simsid.models.loading import shipped_models
        from simsid.training.run_folder import RunFolder

        if self.output is None and self.model in shipped_models():
            raise UsageError(
                f"{self.model} comes with simsid and stays as it is; give a folder for a calibrated copy with -o, or "
                f"adapt it with: simsid adapt {self.model} {shlex.quote(str(self.data))} -o FOLDER"
            )
        if self.output is not None and (self.output / "model.json").exists():
            raise UsageError(f"{self.output} already holds a model; choose another folder with -o")
        folder, workers = self.output or pathlib.Path(self.model), self.machine.workers
        device = self.machine.prepare()
        check_rate("false_positive_rate", self.false_positive_rate)
        # A training in progress would get back the weights that are loaded here.
        is_run = (folder / "run.json").exists()
        with RunFolder(folder) if is_run else contextlib.nullcontext():
            model = load(self.model if self.output else folder, device=device, precision=self.precision)
            dataset = open_dataset(self.data, exclude=self.exclude)
            if self.local:
                train_records, normal = [record for record in dataset.records if record.label != 1], []
            else:
                train_records, val_records = partition(dataset, self.val_share)
                normal = [record for record in val_records if record.label != 1]
            if not train_records:
                raise UsageError(f"{self.data} has no normal image to calibrate on")
            train = load_set(train_records, model.preprocessing, workers)
            val = load_set(normal, model.preprocessing, workers) if normal else None
            # Of a few images the deviation, in whose units scores are, is chance.
            if self.local:
                check_images(self.data, len(train), FEWEST, "calibration on local images")
            model.calibrate(train, train if self.local else val)
            model.save(output_folder(folder))
        held = len(train) if self.local else len(val) if val is not None else 0
        threshold_from = "which also set the threshold" if self.local else f"with {held} held out for thresholds"
        print(f"{folder}: calibrated on {len(train)} normal images, {threshold_from}")
        failures = [*train.failures, *(val.failures if val is not None else ())]
        if failures:
            first = f"{printable(failures[0].path)}: {failures[0].reason}"
            print(f"{len(failures)} files could not be read, such as {first}")
        if held:
            print(threshold_sentence(model, self.false_positive_rate))
        note = few_images_note(held, self.false_positive_rate)
        if self.local and note:
            print(f"simsid: note: {note}", file=sys.stderr)
        return 0


def few_images_note(count: int, false_positive_rate: float) -> str | None:
    """Return a sentence where a threshold rests on so few images that its false positive rate is hardly known."""
    from simsid.metrics import false_positive_interval

    enough = math.ceil(FALSE_POSITIVES / false_positive_rate)
    if count >= enough:
        return None
    low, high = false_positive_interval(enough, false_positive_rate)
    return (
        f"{count} normal images say little about a false positive rate of {false_positive_rate:.3g}; "
        f"with {enough} it lies between {low:.3g} and {high:.3g}"
    )


def threshold_sentence(model: "AnomalyModel", false_positive_rate: float) -> str:
    """Describe the threshold: how many held-out images it rests on, and the interval of its false positive rate."""
    from simsid.metrics import allowed_above, false_positive_interval

    calibration = model.calibrated()
    held = calibration.holdout[model.signal]
    count = len(held)
    if not allowed_above(count, false_positive_rate):
        return (
            f"threshold of {model.signal}: {max(held):.6g}, the largest of {count} normal images, which are too few "
            f"for a false positive rate of {false_positive_rate:.3g}: {1 / (count + 1):.2g} is what they guarantee"
        )
    low, high = false_positive_interval(count, false_positive_rate)
    threshold = calibration.threshold(model.signal, false_positive_rate)
    return (
        f"threshold of {model.signal}: {threshold:.6g}, from {count} normal images, for a false positive rate of at "
        f"most {false_positive_rate:.3g}; on new images of the same origin the rate lies between {low:.3g} and "
        f"{high:.3g} with 95 % confidence"
    )

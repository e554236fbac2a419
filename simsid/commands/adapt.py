"""`simsid adapt`."""

import pathlib
import shlex
import sys
from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from simsid.commands.calibrate import few_images_note, threshold_sentence
from simsid.commands.common import Exclude, Machine, ModelFolder, Output, load_set, output_folder
from simsid.errors import UsageError, printable


@dataclass(frozen=True)
class Adapt:
    """Add a site's own normal images to a model's memory and recalibrate on them, without anomalies and in seconds.

    The model that is adapted stays as it is; the new one records what it rested on before, and --undo restores that.
    """

    model: ModelFolder
    """Model folder, or the name of a shipped model."""
    output: Output
    """Folder for the adapted model, or with --undo for the model as it was fitted."""
    data: Positional[Annotated[pathlib.Path | None, arg(metavar="[DATA]")]] = None
    """Normal images of the site, in any form `train` takes; images with the label abnormal are left out."""
    undo: bool = False
    """Take out the images of every adaptation of MODEL instead, and restore its calibration; without DATA."""
    false_positive_rate: float = 0.05
    """Share of normal images that the threshold may flag; printed, and chosen again when scoring."""
    exclude: Exclude = ()
    """Files to leave out, as patterns of their path below the folder, such as masks/*."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Adapt or undo, save, and print what changed."""
        if (self.output / "model.json").exists():
            raise UsageError(f"{self.output} already holds a model; choose another folder with -o")
        if not self.undo:
            return self._adapt()
        from simsid.models import load

        if self.data is not None:
            raise UsageError(f"--undo takes no images; leave out {self.data}")
        model = load(self.model, device=self.machine.prepare())
        model.revert()
        model.save(output_folder(self.output))
        print(f"{self.output}: {self.model} without the images that it was adapted to, calibrated as it was fitted")
        return 0

    def _adapt(self) -> int:
        from simsid.data import open_dataset
        from simsid.models import load

        if self.data is None:
            raise UsageError("adapt needs normal images: simsid adapt MODEL DATA -o FOLDER")
        model = load(self.model, device=self.machine.prepare())
        records = [record for record in open_dataset(self.data, exclude=self.exclude).records if record.label != 1]
        if not records:
            raise UsageError(f"{self.data} has no normal image to adapt to")
        images = load_set(records, model.preprocessing, self.machine.workers)
        done = model.adapt(images, progress=True)
        model.save(output_folder(self.output))
        known = f" ({done.known} were in it already)" if done.known else ""
        print(f"{self.output}: {done.added} images added to a memory of {done.fitted}{known}")
        for name, deviations in done.abnormal:
            print(f"looks abnormal, {deviations:.1f} deviations above the median: {printable(name)}")
        if images.failures:
            first = f"{printable(images.failures[0].path)}: {images.failures[0].reason}"
            print(f"{len(images.failures)} of {len(records)} files could not be read, such as {first}")
        print(threshold_sentence(model, self.false_positive_rate))
        note = few_images_note(done.added, self.false_positive_rate)
        if note:
            print(f"simsid: note: {note}", file=sys.stderr)
        print(f"{self.model} is as it was; undo with: simsid adapt {shlex.quote(str(self.output))} --undo -o FOLDER")
        return 0

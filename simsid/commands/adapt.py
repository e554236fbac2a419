"""`simsid adapt`."""

import pathlib
import sys
from dataclasses import dataclass, field

from tyro.conf import OmitArgPrefixes

from simsid.commands.calibrate import few_images_note, threshold_sentence
from simsid.commands.common import Data, Exclude, Machine, ModelFolder, Output, load_set, output_folder
from simsid.errors import UsageError, printable


@dataclass(frozen=True)
class Adapt:
    """Add a site's own normal images to a model's memory and recalibrate on them, without anomalies and in seconds.

    The model that is adapted stays as it is; the new one records what it rested on before.
    """

    model: ModelFolder
    """Model folder, or the name of a shipped model."""
    data: Data
    """Normal images of the site, in any form `train` takes; images with the label abnormal are left out."""
    output: Output
    """Folder for the adapted model."""
    false_positive_rate: float = 0.05
    """Share of normal images that the threshold may flag; printed, and chosen again when scoring."""
    exclude: Exclude = ()
    """Files to leave out, as patterns of their path below the folder, such as masks/*."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Adapt, save and print what changed."""
        from simsid.data import open_dataset
        from simsid.models import load

        if (self.output / "model.json").exists():
            raise UsageError(f"{self.output} already holds a model; choose another folder with -o")
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
            print(f"{len(images.failures)} of {len(records)} files could not be read; the first: {images.failures[0]}")
        print(threshold_sentence(model, self.false_positive_rate))
        note = few_images_note(done.added, self.false_positive_rate)
        if note:
            print(f"simsid: note: {note}", file=sys.stderr)
        print(f"what it rested on before: {pathlib.Path(self.model)}; undo with FeatureMemory.revert()")
        return 0

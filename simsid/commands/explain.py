"""`simsid explain`."""

import dataclasses
import sys
from dataclasses import dataclass, field

from tyro.conf import OmitArgPrefixes

from simsid.commands.common import (
    Data,
    Exclude,
    Machine,
    ModelFolder,
    Output,
    SignalName,
    output_folder,
    refuse_output_among_images,
)


@dataclass(frozen=True)
class Explain:
    """Draw where images are anomalous: for each its heat map as a picture and as numbers, listed in explain.csv.

    Both have the image's own size: NAME.png shows the map over the image and a color bar with its unit, NAME.npy holds
    the values. The exit status is 0 when every file has a map, 1 when some have, 2 when none has.
    """

    model: ModelFolder
    """Model or run folder, or the name of a shipped model."""
    data: Data
    """Folder of images (any depth), one image, or a CSV with a path column."""
    output: Output
    """Folder for the maps and explain.csv, outside the folder of images."""
    signal: SignalName = None
    """Signal whose map is drawn; without it the model's own, or else the first that has a map."""
    limit: float | None = None
    """Value at the bright end of every color bar, so that images compare; without it each has its own."""
    exclude: Exclude = ()
    """Files to leave out, as patterns of their path below the folder, such as masks/*."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Write the maps of every file; files that cannot be read get a reason."""
        from simsid import checkpoint
        from simsid.data import iter_records
        from simsid.models import load
        from simsid.parallel import with_progress
        from simsid.scoring.heat_maps import Explained, explain_files

        model = load(self.model, device=self.machine.prepare())
        name = model.choose_map(self.signal)
        refuse_output_among_images(self.data, self.output)
        records = iter_records(self.data, exclude=self.exclude)
        output = output_folder(self.output)
        results = explain_files(
            model, records, output, signal=name, limit=self.limit, workers=self.machine.workers or None
        )
        if sys.stderr.isatty():
            total = sum(1 for _ in iter_records(self.data, exclude=self.exclude))
            results = iter(with_progress(results, total, "explaining"))
        done = failed = 0
        columns = [entry.name for entry in dataclasses.fields(Explained)]
        with checkpoint.csv_writer(output / "explain.csv", columns) as write:
            for result in results:
                write(dataclasses.astuple(result))
                done += not result.reason
                failed += bool(result.reason)
        missed = f", {failed} failed (reasons in explain.csv)" if failed else ""
        print(f"{done} of {done + failed} maps of {name} written to {output}{missed}")
        return 0 if not failed else 1 if done else 2

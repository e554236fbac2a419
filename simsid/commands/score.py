"""`simsid score`."""

import pathlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tyro.conf import OmitArgPrefixes

from simsid.commands.common import (
    Data,
    Exclude,
    Machine,
    ModelFolder,
    Output,
    PrecisionName,
    SignalName,
    calibrated_model,
    clear_film_pages,
    described,
    for_processing_notes,
    refuse_file,
    saved,
    versions,
)
from simsid.errors import printable

if TYPE_CHECKING:
    from simsid.models import AnomalyModel
    from simsid.scoring import Summary


@dataclass(frozen=True)
class Score:
    """Score images: one row for each in scores.csv, the most anomalous pictured in report.html.

    Stopped or killed, the same command resumes. Under torchrun, every process scores a shard, and the last to finish
    writes the table. The exit status is 0 when every file was scored, 1 when some were, 2 when none was.
    """

    model: ModelFolder
    """Model or run folder, or the name of a shipped model."""
    data: Data
    """Folder of images (any depth), one image, or a CSV with a path column."""
    output: Output
    """Folder for scores.csv and report.html."""
    signal: SignalName = None
    """Signal that scores and flags; without it the model's own. Every signal is in the table."""
    false_positive_rate: float = 0.05
    """Share of held-out normal images that the threshold may flag."""
    exclude: Exclude = ()
    """Files to leave out, as patterns of their path below the folder, such as masks/*."""
    pictures: int = 24
    """Most anomalous images to picture in report.html; 0 writes no report."""
    batch_size: int = 16
    """Images of a forward pass."""
    precision: PrecisionName = "auto"
    """Arithmetic; auto is that of the model's calibration, and another one is refused."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Score every file of this rank, and merge where all ranks have finished; unreadable files get a reason."""
        # Before the slow imports, during which other ranks may finish and merge.
        before = _version(self.output / "scores.csv")
        from simsid.distributed import ProcessGroup
        from simsid.scoring import score_archive

        group = ProcessGroup.from_environment()
        model = calibrated_model(self.model, self.machine.prepare(group), self.precision)
        refuse_file(self.output)
        summary = score_archive(
            model,
            self.data,
            self.output,
            signal=self.signal,
            false_positive_rate=self.false_positive_rate,
            batch_size=self.batch_size,
            workers=self.machine.workers or None,
            pictures=self.pictures,
            group=group,
            progress=group.main and sys.stderr.isatty(),
            exclude=self.exclude,
            before=before,
            report=lambda summary: self._report(model, summary),
        )
        who = f"rank {group.rank} of {group.size}: " if group.size > 1 else ""
        if summary.resumed:
            print(f"{who}resumed after {summary.resumed} files that were done", flush=True)
        if summary.state == "already merged":
            print(f"{who}every file was scored already, and another rank has merged the table")
            return 0
        if summary.state == "interrupted":
            print(f"{who}stopped after {summary.done} files; the same command resumes", file=sys.stderr)
            return 130
        if summary.state == "waiting":
            print(f"{who}{summary.done} files done; rank {', '.join(map(str, summary.missing))} has not finished")
            return 0
        return self._conclude(model, summary)

    def _conclude(self, model: "AnomalyModel", summary: "Summary") -> int:
        """Print the counts and where the results are."""
        from simsid.metrics import allowed_above

        failed = f", {summary.failed} failed (reasons in scores.csv)" if summary.failed else ""
        print(f"{summary.scored} of {summary.scored + summary.failed} files scored{failed}")
        held = model.calibrated().holdout.get(self.signal or model.signal)
        if not held:
            print("no threshold: the model was calibrated without held-out normal images")
        elif summary.scored and allowed_above(len(held), self.false_positive_rate):
            print(
                f"{summary.flagged} flagged: above the threshold that {100 * self.false_positive_rate:.3g} % of "
                f"{len(held)} held-out normal images may exceed"
            )
        elif summary.scored:
            print(
                f"{summary.flagged} flagged: above the highest of {len(held)} held-out normal images, too few for a "
                f"rate of {100 * self.false_positive_rate:.3g} %; a score near 1, which compares with the training "
                f"images, can stay below it"
            )
        for note in for_processing_notes(summary.for_processing):
            print(f"simsid: note: {note}", file=sys.stderr)
        if summary.shift is not None:
            print(f"simsid: note: {summary.shift}".replace("MODEL", self.model), file=sys.stderr)
        if summary.top:
            print(f"report: {printable(str(self.output / 'report.html'))}")
        print(f"scores: {printable(str(self.output / 'scores.csv'))}")
        return 0 if not summary.failed else 1 if summary.scored else 2

    def _report(self, model: "AnomalyModel", summary: "Summary") -> None:
        import numpy as np

        from simsid import report
        from simsid.report import selection

        clear_film_pages(self.output)
        if not summary.top:
            return
        notes = [
            f"{summary.scored} images scored, {summary.failed} not; the {len(summary.top)} with the highest "
            f"{self.signal or model.signal} are shown.",
            "The score is standardized on normal training images: 0.5 is an average normal image, 1 is anomalous.",
        ]
        path = self.output / "report.html"
        signal = self.signal or model.signal
        held = np.asarray(model.calibrated().holdout.get(signal, []))
        with saved(f"the scores are in {self.output / 'scores.csv'}"):
            examples = selection.examples_of_scores(model, summary.top, signal)
            pages = {example.path for example in examples}
            rows = [selection.film_row(score, held, signal, pages) for score in reversed(summary.top)]
            report.write_report(
                path,
                title=f"simsid: {self.data.resolve().name}",
                evaluation=None,
                examples=examples,
                rows=rows,
                configuration={"model": described(model)},
                versions=versions(),
                notes=notes,
                warnings=[
                    *for_processing_notes(summary.for_processing),
                    *([] if summary.shift is None else [f"{summary.shift}."]),
                ],
                descriptions=selection.descriptions(model),
            )
            selection.write_film_pages(path, model, rows, examples)


def _version(path: pathlib.Path) -> tuple[int, int] | None:
    """Return what `simsid.scoring.table_version` does, without the imports that it needs."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns

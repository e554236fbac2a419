"""`simsid evaluate`."""

import dataclasses
import pathlib
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
    SignalName,
    SplitName,
    calibrated_model,
    for_processing_notes,
    load_set,
    output_folder,
    saved,
    usual_split,
    write_evaluation_report,
)
from simsid.errors import UsageError, printable

if TYPE_CHECKING:
    from simsid.data import ImageSet
    from simsid.evaluation import Evaluation
    from simsid.models import AnomalyModel


@dataclass(frozen=True)
class Evaluate:
    """Measure a model on labelled radiographs: a table, report.html, metrics.json and scores.csv."""

    model: ModelFolder
    """Model or run folder, or the name of a shipped model."""
    data: Data
    """Labelled images: a published data set's folder, or a CSV (path,label,split,patient)."""
    output: MaybeOutput = None
    """Folder for the results; without it MODEL/evaluation."""
    split: SplitName = None
    """Split to evaluate; without it test, or else val, or else every image."""
    signal: SignalName = None
    """Signal that comes first and flags; without it the model's own. Every signal is in the table."""
    false_positive_rate: float = 0.05
    """Share of held-out normal images that the threshold may flag."""
    shift: bool = False
    """Also measure the images changed as by other equipment (gamma, contrast, blur, position, JPEG): a second table."""
    exclude: Exclude = ()
    """Files to leave out, as patterns of their path below the folder, such as masks/*."""
    precision: PrecisionName = "auto"
    """Arithmetic; auto is that of the model's calibration, and another one is refused."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Evaluate and write; the exit status is 1 when a file could not be read."""
        from simsid import checkpoint
        from simsid.data import open_dataset
        from simsid.evaluation import evaluate, format_table, require_labels, scores_of
        from simsid.metrics import check_rate
        from simsid.models.signals import check_signals
        from simsid.scoring import columns, row

        model = calibrated_model(self.model, self.machine.prepare(), self.precision)
        check_signals([self.signal or model.signal], model.signal_names)
        check_rate("false_positive_rate", self.false_positive_rate)
        dataset = open_dataset(self.data, exclude=self.exclude)
        split = self.split if self.split is not None else usual_split(dataset)
        records = dataset.select(split)
        # Fail now rather than after an hour of decoding.
        require_labels(record.label for record in records)
        _refuse_missing(records)
        output = output_folder(self.output or pathlib.Path(self.model) / "evaluation")
        images = load_set(records, model.preprocessing, self.machine.workers)
        evaluation = evaluate(model, images, false_positive_rate=self.false_positive_rate, signal=self.signal)
        figures = [dataclasses.asdict(figures) for figures in evaluation.rows()]
        document: dict[str, object] = {
            "data": str(self.data.resolve()),
            "split": split,
            "in_sample": evaluation.in_sample,
        }
        checkpoint.write_json(output / "metrics.json", {**document, "rows": figures})
        with checkpoint.csv_writer(output / "scores.csv", columns(model.signal_names)) as write:
            for score in scores_of(model, images, evaluation, records):
                write(row(score, model.signal_names))
        print(format_table(evaluation), flush=True)
        if self.shift:
            document["shift"] = _measured_shifts(model, images, evaluation)
            checkpoint.write_json(output / "metrics.json", {**document, "rows": figures})
        for note in for_processing_notes(sum(record.for_processing for record in images.records)):
            print(f"simsid: note: {note}", file=sys.stderr)
        if images.failures:
            print(f"{len(images.failures)} of {len(records)} files could not be read (reasons in scores.csv)")
        title = f"simsid: {self.data.resolve().name}, {split or 'all images'}"
        with saved(f"the figures are in {output / 'metrics.json'}"):
            write_evaluation_report(model, images, evaluation, output / "report.html", title)
        print(f"report: {printable(str(output / 'report.html'))}")
        return 1 if images.failures else 0


def _measured_shifts(model: "AnomalyModel", images: "ImageSet", evaluation: "Evaluation") -> list[dict[str, object]]:
    """Print the table of the first signal under simulated shifts; return the figures of every signal."""
    from simsid.robustness import evaluate_shifts, format_shifts

    rows = evaluate_shifts(model, images, evaluation, progress=sys.stderr.isatty())
    print(format_shifts(rows, evaluation.default), flush=True)
    return [dataclasses.asdict(row) for row in rows]


def _refuse_missing(records: list) -> None:
    """Name the files of a list that do not exist: evaluated without them, a class could be empty."""
    from simsid.data import missing_files

    missing = missing_files(records)
    if missing:
        raise UsageError(f"{len(missing)} of {len(records)} listed files do not exist, the first: {missing[0]}")

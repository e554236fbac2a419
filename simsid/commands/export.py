"""`simsid export`."""

import pathlib
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from simsid.commands.common import ModelFolder, calibrated_model
from simsid.errors import UsageError


@dataclass(frozen=True)
class Export:
    """Write a model as one file that scores without simsid: a PyTorch program (.pt2) or ONNX (.onnx).

    The file takes images [batch, 1, H, W] in -1..1 and returns every signal and the score; its metadata say how files
    become such images, and hold calibration and thresholds. It is written only if it scores as the model does.
    """

    model: ModelFolder
    """Model or run folder; it must be calibrated."""
    output: Annotated[pathlib.Path, arg(aliases=["-o"], metavar="FILE")]
    """File to write, whose name ends in .pt2, or in .onnx (needs the extra onnx)."""
    false_positive_rate: float = 0.05
    """Fraction of held-out normal images that the thresholds in the metadata may flag."""

    def run(self) -> int:
        """Export, and say what was written."""
        from simsid.export import export_model

        if not self.output.parent.is_dir():
            raise UsageError(f"the folder {self.output.parent} does not exist")
        model = calibrated_model(self.model, "cpu")
        metadata = export_model(model, self.output, false_positive_rate=self.false_positive_rate)
        height, width = metadata["input"]["shape"][2:]
        print(f"{self.output}: images [batch, 1, {height}, {width}] to {', '.join([*metadata['signals'], 'score'])}")
        return 0

"""`simsid study`."""

import fnmatch
import pathlib
import shlex
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from simsid.commands.common import Exclude, Machine, MaybeOutput, refuse_output_among_images
from simsid.config import TrainingConfig
from simsid.errors import UsageError

if TYPE_CHECKING:
    from simsid.study import Cell

NAMES = (
    "components",
    "squid_components",
    "patches",
    "topk",
    "items",
    "mixed",
    "contamination",
    "methods",
    "decay",
    "speed",
)
"""Names of `simsid.study.STUDIES`, which a test compares; here, since that module needs PyTorch."""
StudyName = Literal[NAMES]  # type: ignore[valid-type]


@dataclass(frozen=True)
class Study:
    """Train and evaluate the models of one of the papers' tables or figures, and lay ours out beside the paper's.

    Every model and seed is a run folder: the same command again reads what is finished and resumes the rest.
    """

    name: Positional[Annotated[StudyName, arg(metavar="NAME")]]
    """components, squid_components, patches, topk, items, mixed, contamination, methods, decay or speed."""
    data: pathlib.Path | None = None
    """Labeled images: a published data set's folder, or a CSV (path,label,split,patient); without it DigitAnatomy."""
    output: MaybeOutput = None
    """Folder for runs, table and figure; without it studies/NAME-DATA."""
    seeds: int = 1
    """Runs of each model; with two or more the table has deviations and a t-test."""
    budget: Annotated[float | None, arg(metavar="MINUTES")] = None
    """Minutes for the whole study, from which width and epochs are picked; an estimate."""
    width: int | None = None
    """Width of every network; without it the presets' or the budget's."""
    epochs: int | None = None
    """Epochs of every network; without it 200 or the budget's. Fewer than 50 train at a higher learning rate."""
    images: int | None = None
    """Normal training images to use at most; without it every one."""
    only: Annotated[tuple[str, ...], arg(metavar="PATTERN ...")] = ()
    """Models to run, as patterns of their names in the table or of their folders, such as no_* or k_1*. The others stay
    in the table once run."""
    criterion: str = "auto"
    """What chooses a network's epoch, as in simsid train; auto sees normal validation images alone, auc the labels."""
    exclude: Exclude = ()
    """Files to leave out, as patterns of their path below the folder, such as masks/*."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Run the study; Ctrl-C leaves what the same command resumes."""
        from simsid.study import STUDIES, Plan, StudyImages, StudyRun

        self._check()
        device, study = self.machine.prepare(), STUDIES[self.name]
        chosen = study.cells
        if self.only:
            chosen = tuple(cell for cell in chosen if any(_matches(cell, pattern) for pattern in self.only))
            if not chosen:
                known = ", ".join(cell.label for cell in study.cells)
                raise UsageError(f"only must match a model of the study, got {' '.join(self.only)}; they are {known}")
        # Of DigitAnatomy the whole study decides: with abnormal training images all others are drawn differently too.
        contaminated = any(cell.normal_share < 1 for cell in (chosen if self.data else study.cells))
        images = StudyImages(
            self.data,
            most=self.images,
            contaminated=contaminated,
            exclude=self.exclude,
            workers=self.machine.workers or None,
        )
        plan = None if self.budget else Plan(self.width, self.epochs or Plan.epochs)
        folder = self.output or pathlib.Path("studies") / f"{self.name}-{pathlib.Path(images.name).stem}"
        run = StudyRun(
            *(self.name, study, images, folder, self.seeds, plan, self.budget, self.criterion, device, _report), chosen
        )
        text = run.run()
        if text is None:
            print("stopped; the same command resumes the study", file=sys.stderr)
            return 130
        print(f"{text}\n\ntable, figure and runs: {shlex.quote(str(folder))}")
        return 0

    def _check(self) -> None:
        if self.data is not None and self.output is not None:
            refuse_output_among_images(self.data, self.output)
        TrainingConfig(criterion=self.criterion)  # type: ignore[arg-type]  # refuses an unknown one
        for name in ("seeds", "width", "epochs", "images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if self.budget is not None and not self.budget > 0:
            raise UsageError(f"budget must be a positive number of minutes, got {self.budget:g}")
        if self.budget is not None and (self.width or self.epochs):
            raise UsageError("a budget picks width and epochs; give either --budget, or --width and --epochs")


def _matches(cell: "Cell", pattern: str) -> bool:
    """Return whether a pattern matches a model's name in the table or that of its folder."""
    return any(fnmatch.fnmatchcase(name, pattern) for name in (cell.label, cell.folder))


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

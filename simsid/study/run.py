"""A whole study: its cells one after the other, resumable, then the table and the figure."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from simsid import checkpoint
from simsid.errors import CheckpointError, ConfigError, RunError
from simsid.study import table
from simsid.study.cells import Result, cell_folder, run_cell
from simsid.study.images import StudyImages
from simsid.study.plan import Plan, choose_plan, configuration, is_network
from simsid.study.studies import Cell, Study
from simsid.training.run_folder import RunFolder

REQUEST = "study.json"


@dataclass(frozen=True)
class StudyRun:
    """A study as it was asked for.

    Args:
        name: of the study.
        study: what is compared.
        images: what on.
        folder: where the cells and the table are written.
        seeds: runs of each cell, with the seeds 0, 1, ...
        plan: width and epochs; None picks them for the minutes.
        minutes: time for all cells and seeds, where there is no plan.
        criterion: what chooses the epoch, see `TrainingConfig`; `"auto"` sees no abnormal image.
        device: where to compute.
        report: called with a line about each step.
    """

    name: str
    study: Study
    images: StudyImages
    folder: pathlib.Path
    seeds: int
    plan: Plan | None
    minutes: float | None
    criterion: str
    device: str
    report: Callable[[str], None]

    def run(self) -> str | None:
        """Run what is not finished, write table.md, results.csv and pictures, and return the table as text.

        Returns:
            The table, or None where Ctrl-C stopped a training.

        Raises:
            RunError: the folder is in use, or holds another study.
            ConfigError: no cell can be built at these sizes.
        """
        cells = self._possible()
        results: dict[str, list[Result]] = {cell.label: [] for cell in cells}
        # A folder of its own for the lock: `RunFolder` names each cell's, and a run's files are not the study's.
        with RunFolder(self.folder):
            document = self._document()
            plan = self.plan or self._planned()
            # The fitted models first: what they take is known only afterwards, and the rest is the networks'.
            fitted = [cell for cell in cells if not is_network(cell)]
            if not self._run(fitted, plan or Plan(), results):
                return None
            trained = [cell for cell in cells if is_network(cell)]
            if plan is None and trained:
                spent = sum(result.seconds for found in results.values() for result in found) / 60
                left = max((self.minutes or 0.0) - spent, 0.0)
                plan = choose_plan(left, trained, self.seeds, self.images, self.device)
                self.report(f"width {plan.width}, epochs: {plan.epochs}, {plan.measured}")
            checkpoint.write_json(
                self.folder / REQUEST,
                {**document, "minutes": self.minutes, "plan": dataclasses.asdict(plan) if plan else None},
            )
            if not self._run(trained, plan or Plan(), results):
                return None
            return self._write(cells, results, plan)

    def _run(self, cells: Sequence[Cell], plan: Plan, results: dict[str, list[Result]]) -> bool:
        """Run cells with every seed, seed by seed; False when interrupted."""
        total = len(cells) * self.seeds
        for number, (seed, cell) in enumerate((seed, cell) for seed in range(self.seeds) for cell in cells):
            result = run_cell(cell, seed, plan, self.images, self.folder, criterion=self.criterion, device=self.device)
            if result is None:
                return False
            results[cell.label].append(result)
            auc = result.auc[result.signal]
            self.report(f"{number + 1}/{total} {cell.label}, seed {seed}: AUC {auc:.3f}, {result.seconds:.0f} s")
        return True

    def _possible(self) -> list[Cell]:
        """Return the cells that can be built; those that the image size rules out are named."""
        reasons = {cell.label: self._reason(cell) for cell in self.study.cells}
        errors = {label: error for label, error in reasons.items() if error is not None}
        if len(errors) == len(reasons):
            raise next(iter(errors.values()))
        for label, error in errors.items():
            self.report(f"left out {label}: {error}")
        return [cell for cell in self.study.cells if cell.label not in errors]

    def _reason(self, cell: Cell) -> ConfigError | None:
        """Return why a cell cannot be built, or None."""
        try:
            configuration(cell, self.images.digits, self.plan.width if self.plan and is_network(cell) else None)
        except ConfigError as error:
            return error
        return None

    def _document(self) -> dict[str, Any]:
        """Return the request; a folder that holds another one is refused, further seeds are not."""
        document: dict[str, Any] = {
            "study": self.name,
            "data": self.images.name,
            "train": self.images.train_count,
            "criterion": self.criterion,
        }
        if (self.folder / REQUEST).exists():
            found = checkpoint.read_json(self.folder / REQUEST)
            for key, value in document.items():
                if found.get(key) != value:
                    raise RunError(f"{self.folder} holds a study with another {key}; choose another folder with -o")
        return document

    def _planned(self) -> Plan | None:
        """Return the plan that an earlier start of this study made for the same minutes."""
        if not (self.folder / REQUEST).exists():
            return None
        found: Any = checkpoint.read_json(self.folder / REQUEST)
        try:
            return Plan(**found["plan"]) if found.get("plan") and found.get("minutes") == self.minutes else None
        except TypeError as error:
            raise CheckpointError(f"{self.folder / REQUEST} is not a study's request: {error}") from None

    def _write(self, cells: Sequence[Cell], results: dict[str, list[Result]], plan: Plan | None) -> str:
        from simsid.report.figures import png
        from simsid.study import reconstructions
        from simsid.study.figure import draw

        rows = table.summarize(self.study, cells, results, self.images)
        parts = [table.main_table(rows, with_paper=not self.images.digits), table.signal_table(rows)]
        if not parts[1][1]:
            del parts[1]
        title = f"{self.name}: {self.study.title}"
        said = table.notes(rows, self.images, plan, self.seeds)
        if self.study.reconstructions:
            folders = {cell.label: cell_folder(self.folder, cell, 0) for cell in cells if results[cell.label]}
            pictures, left_out = reconstructions.draw(folders, self.images)
            if pictures is not None:
                checkpoint.write_file(self.folder / "reconstructions.png", png(pictures, dpi=100))
            if left_out:
                said.append(f"Not in reconstructions.png, as they reconstruct no image: {', '.join(left_out)}.")
        page = [f"# {title}", *(table.as_markdown(*part) for part in parts), "\n".join(f"- {line}" for line in said)]
        checkpoint.write_file(self.folder / "table.md", ("\n\n".join(page) + "\n").encode())
        with checkpoint.csv_writer(self.folder / "results.csv", table.CSV_COLUMNS) as write:
            for row in table.csv_rows(cells, results):
                write(row)
        drawn = png(draw(self.study, rows, f"{self.name}, {self.images.name}"), dpi=100)
        checkpoint.write_file(self.folder / "figure.png", drawn)
        return "\n\n".join([title, *(table.as_text(*part) for part in parts), "\n".join(said)])

"""A whole study: its cells one after the other, resumable, then the table and the figure."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from simsid import checkpoint
from simsid.errors import CheckpointError, ConfigError
from simsid.study import table
from simsid.study.cells import Result, cell_folder, finished_result, run_cell
from simsid.study.differences import refuse_difference
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
        only: the cells to run; None is every one. The others are in the table where the folder has them finished.
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
    only: tuple[Cell, ...] | None = None

    def run(self) -> str | None:
        """Run what is not finished, write table.md, results.csv and pictures, and return the table as text.

        Returns:
            The table, or None where Ctrl-C stopped a training.

        Raises:
            RunError: the folder is in use, or holds another study.
            ConfigError: no cell can be built at these sizes.
        """
        cells = self._possible()
        # The fitted models first: what they take is known only afterwards, and the rest is the networks'.
        fitted = [cell for cell in cells if not is_network(cell)]
        trained = [cell for cell in cells if is_network(cell)]
        # A folder of its own for the lock: `RunFolder` names each cell's, and a run's files are not the study's.
        with RunFolder(self.folder):
            document = self._document()
            plan, minutes = self._known_plan(trained)
            # Before anything is trained or written: another request must leave the folder as it is.
            results = self._finished(cells if plan else fitted, plan or Plan())
            if not self._run(fitted, plan or Plan(), results):
                return None
            if plan is None and self._chosen(trained):
                plan = self._picked(fitted, trained, results)
                results |= self._finished(trained, plan)
            checkpoint.write_json(
                self.folder / REQUEST,
                {**document, "minutes": minutes, "plan": dataclasses.asdict(plan) if plan else None},
            )
            if not self._run(trained, plan or Plan(), results):
                return None
            return self._write(cells, results, plan)

    def _chosen(self, cells: Sequence[Cell]) -> list[Cell]:
        """Return those of the cells that are run."""
        return [cell for cell in cells if self.only is None or cell in self.only]

    def _finished(self, cells: Sequence[Cell], plan: Plan) -> dict[str, list[Result]]:
        """Read the cells that the folder has finished, whichever start of the study ran them."""
        results: dict[str, list[Result]] = {cell.label: [] for cell in cells}
        for cell in cells:
            for seed in itertools.count():
                result = finished_result(cell, seed, plan, self.images, self.folder, criterion=self.criterion)
                if result is None:
                    break
                results[cell.label].append(result)
        return results

    def _run(self, cells: Sequence[Cell], plan: Plan, results: dict[str, list[Result]]) -> bool:
        """Run the chosen cells that are not finished, seed by seed; False when interrupted."""
        chosen = self._chosen(cells)
        total = len(chosen) * self.seeds
        for number, (seed, cell) in enumerate((seed, cell) for seed in range(self.seeds) for cell in chosen):
            found = results[cell.label]
            if seed == len(found):
                new = run_cell(cell, seed, plan, self.images, self.folder, criterion=self.criterion, device=self.device)
                if new is None:
                    return False
                found.append(new)
            result = found[seed]
            auc = result.auc[result.signal]
            self.report(f"{number + 1}/{total} {cell.label}, seed {seed}: AUC {auc:.3f}, {result.seconds:.0f} s")
        return True

    def _possible(self) -> list[Cell]:
        """Return the cells that can be built; those that the image size rules out are named."""
        reasons = {cell.label: self._reason(cell) for cell in self.study.cells}
        errors = {label: error for label, error in reasons.items() if error is not None}
        chosen = [cell.label for cell in self._chosen(self.study.cells)]
        if all(label in errors for label in chosen):
            raise errors[chosen[0]]
        for label in chosen:
            if label in errors:
                self.report(f"left out {label}: {errors[label]}")
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
            refuse_difference(f"{self.folder} holds a study", found, document)
        return document

    def _known_plan(self, trained: Sequence[Cell]) -> tuple[Plan | None, float | None]:
        """Return width and epochs, None where they must be picked, and the minutes that they belong to."""
        former, minutes = self._former_plan()
        if not self._chosen(trained):
            return former, minutes  # of the networks that are only read
        if self.plan is not None:
            return self.plan, None
        if former is not None and minutes != self.minutes:
            # Picked again, width and epochs would be others, and the networks of the folder not comparable.
            if any((cell_folder(self.folder, cell, 0) / "run.json").exists() for cell in trained):
                refuse_difference(f"{self.folder} holds a study", {"minutes": minutes}, {"minutes": self.minutes})
            former = None
        return former, self.minutes

    def _former_plan(self) -> tuple[Plan | None, float | None]:
        """Return the plan of the folder's networks, and the minutes that it was picked for."""
        path = self.folder / REQUEST
        found: Any = checkpoint.read_json(path) if path.exists() else {}
        plan, names = found.get("plan"), [field.name for field in dataclasses.fields(Plan)]
        if not plan:
            return None, None
        if not isinstance(plan, dict) or plan.keys() != set(names):
            raise CheckpointError(
                f"{path}: plan must hold {', '.join(names)}, got {plan!r}; choose another folder with -o"
            )
        return Plan(**plan), found.get("minutes")

    def _picked(self, fitted: Sequence[Cell], trained: Sequence[Cell], results: dict[str, list[Result]]) -> Plan:
        """Pick width and epochs for the minutes that the fitted models leave."""
        chosen = self._chosen(fitted)
        spent = sum(result.seconds for cell in chosen for result in results[cell.label][: self.seeds]) / 60
        left = max((self.minutes or 0.0) - spent, 0.0)
        plan = choose_plan(left, self._chosen(trained), self.seeds, self.images, self.device)
        self.report(f"width {plan.width}, epochs: {plan.epochs}, {plan.measured}")
        return plan

    def _write(self, cells: Sequence[Cell], results: dict[str, list[Result]], plan: Plan | None) -> str:
        from simsid.report.figures import png
        from simsid.study import reconstructions
        from simsid.study.figure import draw

        rows = table.summarize(self.study, cells, results, self.images)
        parts = [table.main_table(rows, with_paper=not self.images.digits), table.signal_table(rows)]
        if not parts[1][1]:
            del parts[1]
        title = f"{self.name}: {self.study.title}"
        said = table.notes(rows, self.images, plan)
        if self.study.reconstructions:
            folders = {cell.label: cell_folder(self.folder, cell, 0) for cell in cells if results.get(cell.label)}
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

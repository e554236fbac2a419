"""`simsid demo`."""

import dataclasses
import pathlib
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from typing import Any

from tyro.conf import OmitArgPrefixes

from simsid.commands.common import Machine, Output, saved, write_evaluation_report
from simsid.config import Config
from simsid.errors import UsageError

SAMPLE_NOTES = (
    "Twelve radiographs of children, six normal and six with pneumonia, scored by the shipped model zhanglab. They are "
    "among its validation images, so these figures are in-sample and say nothing of other hospitals.",
    "Radiographs: Kermany, Zhang, Goldbaum, Mendeley Data 2018, doi:10.17632/rscbjbr9sj, CC BY 4.0, resized.",
)

NOTES = (
    "Trained on normal grids alone; no anomaly was seen in training, and the last epoch is kept. Held-out normal grids "
    "set the threshold.",
    "Training, validation and test grids are made of disjoint handwritten digits.",
)


@dataclass(frozen=True)
class Demo:
    """Score sample radiographs with the shipped model, then train on DigitAnatomy and report.

    No download, no GPU; seconds for the radiographs, about a minute and a half on two cores for the training.
    """

    output: Output = pathlib.Path("simsid-demo")
    """Folder for the trained model and report.html; an earlier demo there is replaced."""
    epochs: int = 4
    """Passes over the training images."""
    images: int = 2000
    """Normal training images to draw."""
    seed: int = 0
    """Seed of digits, weights and training."""
    mnist: pathlib.Path | None = None
    """Folder with MNIST's four idx files, to be used instead of scikit-learn's digits."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Train, evaluate on held-out digits, print the table, write the report."""
        from simsid.data import DigitAnatomy
        from simsid.evaluation import evaluate, format_table
        from simsid.models.presets import seeded_model
        from simsid.study.plan import short_training
        from simsid.training import Trainer
        from simsid.training.run_folder import RunFolder

        device = self.machine.prepare()
        config = Config.digit_anatomy()
        training = short_training(self.epochs, digits=True, criterion="last", seed=self.seed)
        if self.images < 2:
            raise UsageError(f"images must be at least 2, got {self.images}")
        _check_replaceable(self.output)
        data = DigitAnatomy(seed=self.seed, train=self.images, mnist=self.mnist)
        with RunFolder(self.output) as folder:
            _clear_run(folder.path)
            print(score_samples(self.output / "radiographs"), flush=True)
            request = {"command": "demo", "model": config.to_dict(), "training": training.to_dict()}
            folder.write_request({**request, "images": self.images, "seed": self.seed, "mnist": self.mnist is not None})
            train, val, test = (data.load(split, config.image_size) for split in ("train", "val", "test"))
            print(
                f"DigitAnatomy: {len(train)} normal images to train on; {len(val)} to validate, {len(test)} to test",
                flush=True,
            )
            model: Any = seeded_model("digit_anatomy", config, self.seed, device)
            history = Trainer(model, training, run=folder, progress=True).fit(train, val)
            if history.interrupted:
                print("stopped; run the demo again to start over", file=sys.stderr)
                return 130
            evaluation, report = evaluate(model, test), self.output / "report.html"
            print(format_table(evaluation), flush=True)
            with saved(f"the model is trained and saved in {self.output}"):
                extra = {"training": training.to_dict()}
                write_evaluation_report(model, test, evaluation, report, "simsid demo: DigitAnatomy", NOTES, extra)
        print(f"report: {report}    model: simsid score {shlex.quote(str(self.output))} FOLDER -o DIR")
        return 0


def score_samples(output: pathlib.Path) -> str:
    """Evaluate the shipped model on the sample radiographs, write a report with their maps, and return a table."""
    from simsid.data import SAMPLES, load_images, read_csv
    from simsid.evaluation import evaluate, scores_of
    from simsid.models import load

    model = load("zhanglab")
    images = load_images(read_csv(SAMPLES), **dataclasses.asdict(model.preprocessing))
    evaluation = evaluate(model, images)
    output.mkdir(exist_ok=True)
    report = output / "report.html"
    write_evaluation_report(model, images, evaluation, report, "simsid demo: chest radiographs", SAMPLE_NOTES)
    lines = ["radiograph                          finding    score  flagged"]
    for score in scores_of(model, images, evaluation):
        name = pathlib.Path(score.path).name
        lines.append(f"{name:<35} {score.finding:<10} {score.score:.3f}  {'yes' if score.flagged else 'no'}")
    return "\n".join([*lines, f"report with maps: {report}"])


def _check_replaceable(path: pathlib.Path) -> None:
    """Refuse a folder that holds anything but an earlier demo."""
    from simsid.checkpoint import read_json

    if path.is_dir():
        if (path / "run.json").exists():
            if read_json(path / "run.json").get("command") != "demo":
                raise UsageError(f"{path} holds another run; choose another folder with -o")
        elif any(not entry.name.startswith((".lock", ".run.json.")) for entry in path.iterdir()):
            raise UsageError(f"{path} is not empty; choose another folder with -o")


def _clear_run(path: pathlib.Path) -> None:
    from simsid.report import remove_films
    from simsid.training.run_folder import WRITTEN

    # The request goes last: a folder without it is refused the next time.
    shutil.rmtree(path / "radiographs", ignore_errors=True)
    for pattern in (*(name for name in WRITTEN if name != "run.json"), "report.html", "run.json"):
        for file in path.glob(pattern):
            file.unlink()
    remove_films(path / "report.html")

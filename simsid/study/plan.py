"""How large a study is trained: width and epochs, given or picked so that they fit a number of minutes."""

import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from simsid.config import PAPERS_SCORE, PRESETS, Config, TrainingConfig
from simsid.fields import replaced
from simsid.models.presets import preset, seeded_model
from simsid.study.images import StudyImages
from simsid.study.studies import Cell
from simsid.training import TrainingStep

WIDTHS = (4, 8, 16, 32)
"""Widths that a budget chooses from; 32 is the papers'."""
ENOUGH_EPOCHS = 8
"""A budget takes a greater width only where it leaves this many epochs."""
PUBLISHED_EPOCHS = 200
SHORT_EPOCHS = 50
"""With fewer epochs than this a study trains as `short_training`."""

DIGIT_GEOMETRY: dict[str, object] = {"image_size": 96, "patches": 3, "levels": 3, "signal": "focal_residual"}
UNAUGMENTED: dict[str, object] = {"translate": 0.0, "scale": 0.0}
"""Training on DigitAnatomy: each grid has digits and scales of its own, and all grids have their cells in the same
places. Augmentation would only move the cells, to where no test image has them."""
OF_THE_PAPERS = ("simsid", "squid")
"""Presets of the papers' networks."""
DIGIT_LOOKUP: dict[str, object] = {"topk": 2, "temperature": 8.0}
"""On DigitAnatomy the models with Gumbel shrinkage look up as the preset `digit_anatomy`, which says why."""


@dataclass(frozen=True)
class Plan:
    """How large the networks of a study are, and how long they are trained."""

    width: int | None = None
    """Channels of the first feature map; None is each preset's."""
    epochs: int = PUBLISHED_EPOCHS
    measured: str = ""
    """What the choice rests on, for the table; empty where nothing was measured."""

    def training(self, cell: Cell, seed: int, criterion: str, digits: bool) -> TrainingConfig:
        """Return how a cell is trained: as published, or with the rates of a short training.

        With `digits`, for DigitAnatomy, without augmentation unless the cell asks for it.
        """
        # In one arithmetic on every machine: a study may go on elsewhere, and its rows are compared.
        changes = {"precision": "float32", **cell.training, "seed": seed, "criterion": criterion}
        if self.epochs < SHORT_EPOCHS:
            return short_training(self.epochs, digits, **changes)
        augmentation = UNAUGMENTED if digits else {}
        return TrainingConfig(**{"epochs": self.epochs, **augmentation, **changes})  # type: ignore[arg-type]


def short_training(epochs: int, digits: bool = False, **changes: object) -> TrainingConfig:
    """Return a training of a few epochs: ten times the papers' learning rate, and no weight decay.

    Adam scales the decay of a memory item that is never looked up to the size of a full step, and at such a learning
    rate the in-painting memory's items end at zero. With `digits`, for DigitAnatomy, without augmentation and at
    fifteen times the papers' rate.
    """
    augmentation = UNAUGMENTED if digits else {}
    rates = {"learning_rate": 1.5e-3 if digits else 1e-3, "final_learning_rate": 1e-4, "generator_weight_decay": 0.0}
    return TrainingConfig(**{"epochs": epochs, **rates, **augmentation, **changes})  # type: ignore[arg-type]  # checked by the class


def is_network(cell: Cell) -> bool:
    """Return whether a cell's model is trained by `Trainer`; the others are fitted in one pass."""
    return cell.preset in PRESETS


def configuration(cell: Cell, digits: bool, width: int | None = None, seed: int = 0) -> Any:
    """Return a cell's configuration: the preset's, adjusted to DigitAnatomy, with the cell's changes and the width.

    Raises:
        ConfigError: a configuration that cannot be built, such as patches that do not divide the image.
    """
    base = preset(cell.preset).config()
    fields = {entry.name for entry in dataclasses.fields(base)}
    changes: dict[str, object] = {}
    if digits and is_network(cell):
        changes |= DIGIT_GEOMETRY | (DIGIT_LOOKUP if cell.preset in OF_THE_PAPERS else {})
    elif cell.preset in OF_THE_PAPERS:
        # A study stands beside the papers' tables; it lists every other signal too.
        changes["signal"] = PAPERS_SCORE
    elif digits:
        changes |= {"weight": "uniform"} if "weight" in fields else {"image_size": DIGIT_GEOMETRY["image_size"]}
    if width is not None:
        changes["width"] = width
    if "seed" in fields:
        changes["seed"] = seed
    return replaced(base, {name: value for name, value in changes.items() if name in fields} | dict(cell.changes))


def choose_plan(minutes: float, cells: Iterable[Cell], seeds: int, images: StudyImages, device: str) -> Plan:
    """Pick the greatest width that leaves `ENOUGH_EPOCHS`, and as many epochs as fit, from measured iterations.

    An estimate: every cell is measured for a few iterations on one batch, and other work on the machine moves it.

    Args:
        minutes: time for all cells and seeds.
        cells: the cells that are trained.
        seeds: runs of each cell.
        images: what they are trained on.
        device: where they are trained.
    """
    cells, seconds = list(cells), 60 * minutes / seeds
    width = WIDTHS[0]
    for wider in WIDTHS[1:]:
        fixed, epoch, _ = _cost(cells[0], wider, images, device)
        if seconds / len(cells) < fixed + ENOUGH_EPOCHS * epoch:
            break
        width = wider
    costs = [_cost(cell, width, images, device) for cell in cells]
    fixed, epoch = sum(cost[0] for cost in costs), sum(cost[1] for cost in costs)
    epochs = min(max(int((seconds - fixed) / epoch), 1), PUBLISHED_EPOCHS)
    iteration = sum(cost[2] for cost in costs) / len(costs)
    return Plan(width, epochs, f"picked for {minutes:g} minutes from {iteration:.3f} s an iteration")


def _cost(cell: Cell, width: int, images: StudyImages, device: str) -> tuple[float, float, float]:
    """Return measured seconds of a run without its epochs, of an epoch, and of an iteration."""
    training = short_training(1, images.digits)
    config: Config = configuration(cell, images.digits, width)
    model: Any = seeded_model(cell.preset, config, 0, device)
    train = images.train(model.preprocessing)
    batch = train.batch(slice(0, training.batch_size), device)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        step = TrainingStep(model, training)
        model.train()
        # The first iterations of each kind choose algorithms; on a GPU they are captured.
        warm_up, timed = (4, 16) if model.device.type == "cuda" else (2, 4)
        for number in range(warm_up):
            step(batch, number)
        step.means()
        began = time.perf_counter()
        for number in range(warm_up, warm_up + timed):
            step(batch, number)
        step.means()  # waits for the device
    iteration = (time.perf_counter() - began) / timed
    model.eval()
    began = time.perf_counter()
    model.signals(batch)
    image = (time.perf_counter() - began) / len(batch)
    val = images.val(model.preprocessing, labeled=False)
    val_count = len(val) if val is not None else 0
    epoch = max(len(train) // training.batch_size, 1) * iteration + val_count * image
    return (len(train) + val_count + sum(images.evaluated_counts)) * image, epoch, iteration

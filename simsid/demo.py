"""The demonstration: DigitAnatomy, where normal is digits one to nine in their places."""

import pathlib

from simsid.config import TrainingConfig
from simsid.data import DigitAnatomy

NOTES = [
    "Trained on normal grids alone. The four kinds of anomaly were seen neither in training nor in choosing the epoch: "
    "that was done by reconstruction error on held-out normal grids, which also set the alarm threshold.",
    "Training, validation and test grids are made of disjoint handwritten digits.",
]


def data(seed: int, images: int, mnist: pathlib.Path | None = None) -> DigitAnatomy:
    """Return DigitAnatomy with `images` normal grids to train on."""
    return DigitAnatomy(seed=seed, train=images, mnist=mnist)


def training(epochs: int, seed: int) -> TrainingConfig:
    """Return the demonstration's training: ten times the papers' learning rate, for a tenth of their updates."""
    return TrainingConfig(
        epochs=epochs,
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        criterion="reconstruction",
        seed=seed,
    )

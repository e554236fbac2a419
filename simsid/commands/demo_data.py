"""The demonstration: DigitAnatomy, where normal is digits one to nine in their places."""

import pathlib

from simsid.config import TrainingConfig
from simsid.data import DigitAnatomy

NOTES = [
    "Trained on normal grids alone; no anomaly was seen in training, and the last epoch is kept. Held-out normal "
    "grids set the alarm threshold.",
    "Training, validation and test grids are made of disjoint handwritten digits.",
]


def data(seed: int, images: int, mnist: pathlib.Path | None = None) -> DigitAnatomy:
    """Return DigitAnatomy with `images` normal grids to train on."""
    return DigitAnatomy(seed=seed, train=images, mnist=mnist)


def training(epochs: int, seed: int) -> TrainingConfig:
    """Return the demonstration's training: ten times the papers' learning rate, since a few epochs must do.

    Without weight decay: Adam scales the decay of an item that is never looked up to the size of a full step, and at
    such a learning rate the in-painting memory's items end at zero.
    """
    return TrainingConfig(
        epochs=epochs,
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        generator_weight_decay=0.0,
        criterion="last",
        seed=seed,
    )

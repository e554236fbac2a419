"""Compare what chooses the kept epoch, and how weights decay, in trainings of tiny networks.

    python docs/compare_epochs.py digits
    python docs/compare_epochs.py chest_xray

A training is measured after every epoch by all criteria, so one run of each seed serves them all.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import simsid
from simsid.data import DigitAnatomy, ImageSet, load_images, open_dataset
from simsid.training.criterion import choose_best
from simsid.training.state import History

CRITERIA = ("auc", "reconstruction", "memory_distance", "synthetic", "last")
DECAYS = {"coupled": 1e-5, "except_items": 1e-5, "decoupled": 1e-2}
"""Kinds of weight decay with their coefficients; that of AdamW is applied to the weights times the learning rate."""
DIGITS = {"image_size": 96, "patches": 3, "levels": 3, "topk": 2, "temperature": 8.0, "signal": "focal_residual"}
RADIOGRAPHS = {"image_size": 64, "patches": 2}

Epochs = list[dict[str, float]]


def images(source: str, count: int) -> tuple[ImageSet, ImageSet, dict[str, Any]]:
    """Return training and validation images, and the fields of the networks that are trained on them."""
    if source == "digits":
        data = DigitAnatomy(train=count, val=60, test_normal=4, test_anomalous=4)
        return data.load("train"), data.load("val"), DIGITS
    dataset = open_dataset(source)
    normal = [record for record in dataset.select("train") if record.label == 0][:count]
    return load_images(normal, RADIOGRAPHS["image_size"]), dataset.load("val", RADIOGRAPHS["image_size"]), RADIOGRAPHS


def train(parts: tuple[ImageSet, ImageSet, dict[str, Any]], seed: int, decay: str, epochs: int) -> Epochs:
    """Train a network of width 4 at ten times the papers' learning rate; return the metrics of every epoch."""
    torch.manual_seed(seed)
    model = simsid.Model(simsid.Config(width=4, items=50, decoder_items=50, **parts[2]))
    config = simsid.TrainingConfig(
        epochs=epochs,
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        criterion="synthetic",  # measures every criterion
        precision="float32",
        decay=decay,  # type: ignore[arg-type]
        generator_weight_decay=DECAYS[decay],
        seed=seed,
    )
    return simsid.Trainer(model, config).fit(*parts[:2]).epochs


def criteria_table(runs: Sequence[Epochs], signal: str) -> list[str]:
    """Return a row for each criterion: epochs that it keeps, and the AUCs there, mean over the runs."""
    lines = [f"| criterion | kept epochs | AUC of `{signal}` | AUC of `memory_distance` |", "| --- | --- | --- | --- |"]
    for criterion in CRITERIA:
        kept = []
        for epochs in runs:
            history = History()
            for epoch in epochs:
                choose_best(history, epoch, criterion, signal)
            kept.append(epochs[history.best_epoch or 0])
        numbers = ", ".join(f"{int(epoch['epoch']) + 1}" for epoch in kept)
        figures = [np.mean([epoch[f"val_auc_{name}"] for epoch in kept]) for name in (signal, "memory_distance")]
        lines.append(f"| `{criterion}` | {numbers} | {figures[0]:.3f} | {figures[1]:.3f} |")
    return lines


def decay_table(runs: dict[str, list[Epochs]]) -> list[str]:
    """Return a row for each kind of decay, after the last epoch, mean over the runs."""
    names = ("item_norm", "val_memory_distance", "val_auc_memory_distance", "val_auc_discriminator_per_image")
    lines = ["| decay | norm of the items, epoch 1 | last | memory distance | AUC of it | AUC of the papers' score |"]
    lines.append("| --- " * 6 + "|")
    for decay, found in runs.items():
        first = np.mean([epochs[0]["item_norm"] for epochs in found])
        last = [np.mean([epochs[-1][name] for epochs in found]) for name in names]
        lines.append(f"| `{decay}` | {first:.2f} | " + " | ".join(f"{value:.3f}" for value in last) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="digits, or a folder of labeled radiographs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of the papers' decay; the other kinds have two")
    parser.add_argument("--epochs", type=int, default=0, help="0: 12 on digits, 15 on radiographs")
    parser.add_argument("--images", type=int, default=300, help="normal images to train on")
    options = parser.parse_args(arguments)
    parts = images(options.source, options.images)
    epochs = options.epochs or (12 if options.source == "digits" else 15)
    runs = {
        decay: [train(parts, seed, decay, epochs) for seed in range(options.seeds if decay == "coupled" else 2)]
        for decay in DECAYS
    }
    every = [epochs for found in runs.values() for epochs in found]
    print("\n".join(criteria_table(every, parts[2].get("signal", "discriminator_per_image"))), end="\n\n")
    print("\n".join(decay_table({decay: found[:2] for decay, found in runs.items()})))


if __name__ == "__main__":
    main()

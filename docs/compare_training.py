"""Compare trainings in float32 and in bfloat16: losses by epoch, detection and seconds, seed by seed.

    python docs/compare_training.py digits
    python docs/compare_training.py chest_xray --images 300
    python docs/compare_training.py digits --data-seed 11 --seeds 0 --precisions bfloat16 --epochs 3

On DigitAnatomy it trains as `simsid demo` does. Every model is scored in float32.
"""

import argparse
import ast
import time
from collections.abc import Sequence
from typing import Any, Literal

from simsid.config import Config
from simsid.data import DigitAnatomy, ImageSet, load_images, open_dataset
from simsid.evaluation import evaluate
from simsid.metrics import auc
from simsid.models.presets import seeded_model
from simsid.study.plan import short_training
from simsid.training import Trainer

PRECISIONS: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
SIGNALS = ("focal_residual", "residual", "memory_distance", "standardized_residual", "discriminator_per_image")


def images(source: str, count: int, config: Config, seed: int = 0) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Return images to train on, normal ones to calibrate with, and labeled ones to measure on."""
    if source == "digits":
        data = DigitAnatomy(seed=seed, train=count)
        train, val, test = (data.load(split, config.image_size) for split in ("train", "val", "test"))
        return train, val, test
    dataset = open_dataset(source)
    normal = [record for record in dataset.select("train") if record.label == 0]
    train = load_images(normal[:count], config.image_size)
    return train, load_images(normal[count : count + 200], config.image_size), dataset.load("val", config.image_size)


def train(
    parts: tuple[ImageSet, ImageSet, ImageSet], config: Config, seed: int, digits: bool, **training: Any
) -> list[str]:
    """Train one network, on DigitAnatomy as the demo or on radiographs, and return its cells of the table."""
    model: Any = seeded_model("digit_anatomy", config, seed, "cpu")
    options = short_training(digits=digits, criterion="last", seed=seed, **training)
    began = time.perf_counter()
    history = Trainer(model, options).fit(*parts[:2])
    seconds = time.perf_counter() - began
    losses = ", ".join(f"{epoch['loss_student']:.4f}" for epoch in history.epochs)
    measured = evaluate(model, parts[2])
    areas = [auc(measured.labels, measured.signals[name]).value for name in SIGNALS]
    return [losses, *(f"{area:.3f}" for area in areas), f"{seconds:.0f}"]


def change(text: str) -> tuple[str, Any]:
    """Read `name=value`, whose value is a Python literal."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE with a Python literal, got {text!r}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with every seed in both precisions and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="digits, or a folder of labeled radiographs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=2000, help="normal images to train on")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--data-seed", type=int, default=0, help="seed of the digits that are drawn")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument(
        "--model", nargs="+", type=change, default=[], metavar="NAME=VALUE", help="changes of the configuration"
    )
    parser.add_argument(
        "--training", nargs="+", type=change, default=[], metavar="NAME=VALUE", help="changes of the training"
    )
    options = parser.parse_args(arguments)
    digits = options.source == "digits"
    config = Config.digit_anatomy(width=options.width) if digits else Config.simsid(width=options.width)
    config = config.replace(**dict(options.model))
    parts = images(options.source, options.images, config, options.data_seed)
    print(f"| seed | precision | student loss by epoch | {' | '.join(f'`{name}`' for name in SIGNALS)} | seconds |")
    print("| --- " * 3 + "| ---: " * (len(SIGNALS) + 1) + "|", flush=True)
    for seed in options.seeds:
        for precision in options.precisions:
            settings = {"epochs": options.epochs, "precision": precision, **dict(options.training)}
            cells = train(parts, config, seed, digits, **settings)
            print(f"| {seed} | {precision} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

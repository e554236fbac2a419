"""Print what a narrower precision changes in a model's signals: AUC in both, and the rank correlation of the scores.

    python benchmarks/precision.py runs/chest chest_xray
    python benchmarks/precision.py runs/chest chest_xray --precision int8
    python benchmarks/precision.py runs/features-float32 chest_xray --other runs/features-bfloat16

A network is scored in both precisions from one folder. A feature memory belongs to the precision that it was fitted in,
so that two folders are compared. int8 is simulated in float32: the convolutions of encoder and student get inputs and
weights that are rounded to 255 levels, each image and each output channel with a scale of its own; all else stays in
float32. The exit status is 1 where an AUC moves by more than 0.002 or ranks correlate below 0.999.
"""

import argparse
import copy
import sys
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from simsid import metrics
from simsid.data import DigitAnatomy, ImageSet, load_images, open_dataset
from simsid.models import AnomalyModel, load
from simsid.models.inference import FrozenModel

MOST_AUC, LEAST_RANKS = 0.002, 0.999


def rounded(values: torch.Tensor) -> torch.Tensor:
    """Round each part of the first axis to 255 levels between its largest magnitude and the negative of it."""
    scale = values.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(values.dtype).tiny) / 127
    return (values / scale).round() * scale


def simulate_int8(frozen: Any) -> FrozenModel:
    """Return a copy of a frozen network whose encoder and student convolve rounded inputs by rounded weights."""
    if not isinstance(frozen, FrozenModel):
        raise SystemExit("int8 is simulated for networks alone, and this is not one")
    frozen = copy.deepcopy(frozen)
    for part in (frozen.encoder, frozen.student):
        for module in part.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.data.copy_(rounded(module.weight.data))
                module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    return frozen


def rows(
    wide: AnomalyModel, narrow: AnomalyModel, images: ImageSet, precision: str = "bfloat16"
) -> list[tuple[str, float, float, float]]:
    """Return name, AUC of `wide`, AUC of `narrow` and Spearman's rank correlation of each signal."""
    labels = images.labels
    scorer: Any = simulate_int8(narrow.freeze("float32")) if precision == "int8" else narrow.freeze("bfloat16")
    first, second = wide.freeze("float32").signals(images), scorer.signals(images)
    found = []
    for name, values in first.items():
        areas = [metrics.auc(labels, column).value for column in (values, second[name])]
        found.append((name, *areas, float(spearmanr(values, second[name]).statistic)))
    return found


def table(found: list[tuple[str, float, float, float]], precision: str = "bfloat16") -> str:
    """Return Markdown."""
    lines = [f"| signal | AUC, float32 | {precision} | change | rank correlation |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for name, wide, narrow, ranks in found:
        lines.append(f"| {name} | {wide:.4f} | {narrow:.4f} | {narrow - wide:+.4f} | {ranks:.5f} |")
    return "\n".join(lines)


def holds(found: list[tuple[str, float, float, float]]) -> bool:
    """Return whether the narrower precision may stand in for float32."""
    moved = max(abs(narrow - wide) for _, wide, narrow, _ in found)
    return bool(moved <= MOST_AUC and np.min([ranks for *_, ranks in found]) > LEAST_RANKS)


def main(arguments: list[str] | None = None) -> int:
    """Score and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model folder")
    parser.add_argument("data", help="labelled images, or digits: DigitAnatomy's test grids")
    parser.add_argument("--other", help="the model that is scored in the narrower precision (default: the same)")
    parser.add_argument("--precision", choices=("bfloat16", "int8"), default="bfloat16", help="(default: bfloat16)")
    parser.add_argument("--split", default="val", help="split of the images (default: val)")
    parser.add_argument("--seed", type=int, default=0, help="seed of DigitAnatomy")
    chosen = parser.parse_args(arguments)
    wide = load(chosen.model)
    narrow = load(chosen.other) if chosen.other else wide
    if chosen.data == "digits":
        images = DigitAnatomy(seed=chosen.seed).load("test", wide.preprocessing.image_size)
    else:
        images = load_images(open_dataset(chosen.data).select(chosen.split), **wide.preprocessing.to_dict())
    found = rows(wide, narrow, images, chosen.precision)
    print(table(found, chosen.precision))
    return 0 if holds(found) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Print what bfloat16 changes in a model's signals: AUC in both precisions, and the rank correlation of the scores.

    python benchmarks/precision.py runs/chest chest_xray
    python benchmarks/precision.py runs/features-float32 chest_xray --other runs/features-bfloat16

A network is scored in both precisions from one folder. A feature memory belongs to the precision that it was fitted in,
so that two folders are compared. The exit status is 1 where an AUC moves by more than 0.002 or ranks correlate below
0.999.
"""

import argparse
import sys

import numpy as np
from scipy.stats import spearmanr

from simsid import metrics
from simsid.data import DigitAnatomy, ImageSet, load_images, open_dataset
from simsid.models import AnomalyModel, load

MOST_AUC, LEAST_RANKS = 0.002, 0.999


def rows(wide: AnomalyModel, narrow: AnomalyModel, images: ImageSet) -> list[tuple[str, float, float, float]]:
    """Return name, AUC of `wide`, AUC of `narrow` and Spearman's rank correlation of each signal."""
    labels = images.labels
    first, second = wide.freeze("float32").signals(images), narrow.freeze("bfloat16").signals(images)
    found = []
    for name, values in first.items():
        areas = [metrics.auc(labels, column).value for column in (values, second[name])]
        found.append((name, *areas, float(spearmanr(values, second[name]).statistic)))
    return found


def table(found: list[tuple[str, float, float, float]]) -> str:
    """Return Markdown."""
    lines = ["| signal | AUC, float32 | bfloat16 | change | rank correlation |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, wide, narrow, ranks in found:
        lines.append(f"| {name} | {wide:.4f} | {narrow:.4f} | {narrow - wide:+.4f} | {ranks:.5f} |")
    return "\n".join(lines)


def holds(found: list[tuple[str, float, float, float]]) -> bool:
    """Return whether bfloat16 may stand in for float32."""
    moved = max(abs(narrow - wide) for _, wide, narrow, _ in found)
    return bool(moved <= MOST_AUC and np.min([ranks for *_, ranks in found]) > LEAST_RANKS)


def main(arguments: list[str] | None = None) -> int:
    """Score and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model folder")
    parser.add_argument("data", help="labelled images, or digits: DigitAnatomy's test grids")
    parser.add_argument("--other", help="the model that is scored in bfloat16 (default: the same)")
    parser.add_argument("--split", default="val", help="split of the images (default: val)")
    parser.add_argument("--seed", type=int, default=0, help="seed of DigitAnatomy")
    chosen = parser.parse_args(arguments)
    wide = load(chosen.model)
    narrow = load(chosen.other) if chosen.other else wide
    if chosen.data == "digits":
        images = DigitAnatomy(seed=chosen.seed).load("test", wide.preprocessing.image_size)
    else:
        images = load_images(open_dataset(chosen.data).select(chosen.split), **wide.preprocessing.to_dict())
    found = rows(wide, narrow, images)
    print(table(found))
    return 0 if holds(found) else 1


if __name__ == "__main__":
    sys.exit(main())

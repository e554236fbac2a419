"""Compare SimSID's signals, standardized at each location by held-out normal images, in trainings of tiny networks.

    python docs/compare_signals.py chest_xray

A value at a location is compared with its mean and deviation over normal images that were not trained on:

    z[l] = (value[l] - mu[l]) / sigma[l],    score = mean z, or mean z^2
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import simsid
from simsid import metrics
from simsid.data import ImageSet, load_images, open_dataset
from simsid.models import patches

FIELDS = {"image_size": 64, "patches": 2, "width": 4, "items": 50, "decoder_items": 50}
CELLS = 16  # rows and columns of the cells in which errors of images and shallow features are averaged


def images(source: str, count: int, held: int) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Return `count` normal images to train on, the next `held` to standardize by, and labeled validation images."""
    dataset = open_dataset(source)
    normal = [record for record in dataset.select("train") if record.label == 0]
    size = FIELDS["image_size"]
    return load_images(normal[:count], size), load_images(normal[count : count + held], size), dataset.load("val", size)


@torch.no_grad()
def location_values(model: simsid.Model, batch: Tensor) -> dict[str, Tensor]:
    """Return the values `[B, L]` at each location, by signal, of a model in inference mode."""
    P = model.config.patches

    def cells(first: Tensor, second: Tensor) -> Tensor:
        error = (first - second).square().mean(1, keepdim=True)
        error = error if len(error) == len(batch) else patches.merge(error, P)
        side = min(CELLS, error.shape[-1])
        return F.adaptive_avg_pool2d(error, side).flatten(1).sqrt()

    encoded = model.encoder(patches.split(batch, P))
    student = model.student(encoded.deepest, encoded.skips)
    found = {"residual": cells(batch, student.images)}
    if student.query is not None and model.student.inpainting is not None:
        found["memory distance, in-painting block"] = (student.query - student.retrieved).norm(dim=2)
        found["in-painting error"] = cells(encoded.deepest, model.student.inpainting(encoded.deepest).features)
    for i, query in enumerate(student.decoder_queries):
        found[f"memory distance, decoder level {i + 1}"] = cells(query, model.student.memories[i](query))
    if model.teacher is not None:
        teacher = model.teacher(encoded.deepest, encoded.skips)
        for i, (own, taught) in enumerate(zip(student.features, teacher.features)):
            found[f"distance to the teacher, level {i + 1}"] = cells(own, taught)
    return found


def areas(model: simsid.Model, held: ImageSet, val: ImageSet) -> dict[str, tuple[float, float, float]]:
    """Return the AUC of each signal: mean over locations of the raw values, of z, and of z^2."""
    model.eval()

    def values(part: ImageSet) -> dict[str, np.ndarray]:
        found = [location_values(model, batch) for batch in part.batches(16)]
        return {name: torch.cat([values[name] for values in found]).double().numpy() for name in found[0]}

    normal, result = values(held), {}
    for name, found in values(val).items():
        z = (found - normal[name].mean(0)) / (normal[name].std(0) + 1e-9)
        scores = (found.mean(1), z.mean(1), (z**2).mean(1))
        result[name] = tuple(metrics.auc(val.labels, score).value for score in scores)
    for name, score in model.signals(val).items():
        result[f"`{name}`"] = (metrics.auc(val.labels, score).value, float("nan"), float("nan"))
    return result  # type: ignore[return-value]  # three values each


def table(runs: Sequence[dict[str, tuple[float, float, float]]]) -> list[str]:
    """Return a row for each signal with the AUC of every run."""
    lines = ["| signal | as it is | mean z | mean z^2 |", "| --- | --- | --- | --- |"]
    for name in runs[0]:
        columns = [[run[name][i] for run in runs] for i in range(3)]
        cells = ["" if np.isnan(column).any() else " ".join(f"{value:.3f}" for value in column) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a folder of labeled radiographs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=300, help="normal images to train on")
    parser.add_argument("--held-out", type=int, default=200, help="normal images to standardize by")
    options = parser.parse_args(arguments)
    train, held, val = images(options.source, options.images, options.held_out)
    runs = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        model = simsid.Model(simsid.Config(**FIELDS))  # type: ignore[arg-type]
        rates = {"learning_rate": 1e-3, "final_learning_rate": 1e-4}  # ten times the papers', for so few epochs
        config = simsid.TrainingConfig(epochs=options.epochs, seed=seed, criterion="last", **rates)  # type: ignore[arg-type]
        simsid.Trainer(model, config).fit(train, held)
        runs.append(areas(model, held, val))
        print(f"seed {seed} done", flush=True)
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()

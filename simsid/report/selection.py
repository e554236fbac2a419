"""Which images a report shows, with what a model makes of them."""

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from simsid.data import ImageSet, Record
from simsid.evaluation import Evaluation, scores_of
from simsid.models.base import AnomalyModel
from simsid.models.scorer import BATCH
from simsid.models.signals import MAPS, SIGNALS
from simsid.report.examples import Example, HeatMap, map_limit
from simsid.report.film import FilmRow, page_name, remove_films, write_film
from simsid.scoring import Score


def typical_indices(evaluation: Evaluation, each: int = 3) -> list[int]:
    """Return the indices of images to show: of every kind, normal first, those at even steps through its scores."""
    values = evaluation.signals[evaluation.default]
    groups = [np.flatnonzero(evaluation.labels == 0)]
    groups += [np.flatnonzero((evaluation.labels == 1) & evaluation.subset(kind)) for kind in evaluation.kinds]
    chosen: list[int] = []
    for group in groups:
        ordered = group[np.argsort(values[group], kind="stable")]
        steps = np.unique(np.linspace(0, len(ordered) - 1, 2 * each + 1).round().astype(int)[1::2])
        chosen += ordered[steps].tolist()
    # An image with several findings may be chosen for each.
    return list(dict.fromkeys(chosen))


def examples_of_set(
    model: AnomalyModel, images: ImageSet, evaluation: Evaluation, indices: Iterable[int]
) -> list[Example]:
    """Return the images at `indices` of an evaluated set, with reconstruction and heat map where the model has them.

    Their score is the calibrated one in 0..1, as in the table of all images, and not the raw signal.
    """
    chosen = [int(index) for index in indices]
    scores = model.calibrated().probability(evaluation.default, evaluation.signals[evaluation.default])
    return _examples(
        model,
        images.batch(chosen) if chosen else None,
        [images.records[index] for index in chosen],
        [float(scores[index]) for index in chosen],
        evaluation.default,
    )


def examples_of_scores(model: AnomalyModel, scores: Iterable[Score], signal: str | None = None) -> list[Example]:
    """Return the images that were kept with their scores, the highest score first."""
    shown = [score for score in reversed(list(scores)) if score.image is not None]
    images = _stacked([score.image for score in shown if score.image is not None])
    records = [
        Record(score.path, label=score.label, finding=score.finding, provenance=score.provenance) for score in shown
    ]
    return _examples(model, images, records, [float(score.score or 0.0) for score in shown], signal or model.signal)


def evaluation_rows(
    model: AnomalyModel, images: ImageSet, evaluation: Evaluation, pages: Iterable[str] = ()
) -> list[FilmRow]:
    """Return a row of the report's table for every image of an evaluation, and for every file that cannot be read."""
    held = (evaluation.holdout or {}).get(evaluation.default)
    return [film_row(score, held, evaluation.default, set(pages)) for score in scores_of(model, images, evaluation)]


def film_row(score: Score, held_out: np.ndarray | None, signal: str, pages: set[str]) -> FilmRow:
    """Return the row of one score; the percentile is among held-out normal images. `pages`: paths with a page."""
    percentile = None
    if held_out is not None and len(held_out) and not score.reason:
        percentile = 100.0 * float(np.mean(np.asarray(held_out) < score.signals[signal]))
    return FilmRow(
        score.path,
        score.finding,
        score.label,
        score.score,
        percentile,
        score.flagged,
        score.signals,
        score.reason,
        page_name(score.path) if score.path in pages else None,
    )


def write_film_pages(
    report: str | os.PathLike[str], model: AnomalyModel, rows: Sequence[FilmRow], examples: Sequence[Example]
) -> None:
    """Write the page of every example whose row names one, with every map of the model and standardized signals.

    The pages of an earlier report in that folder are deleted.
    """
    remove_films(report)
    row_of = {row.path: row for row in rows if row.page is not None}
    shown = [example for example in examples if example.path in row_of]
    # One scale for all pages: on its own scale a normal image would glow like an abnormal one.
    limits = {
        name: map_limit(HeatMap(name, np.stack([example.maps[name] for example in shown])))
        for name in distinct_maps(model)
        if shown
    }
    for example in shown:
        row = row_of[example.path]
        write_film(
            pathlib.Path(report),
            row,
            example,
            maps=[HeatMap(name, example.maps[name], MAPS[name].unit, limit) for name, limit in limits.items()],
            standardized=_standardized(model, row.signals),
            descriptions=descriptions(model),
        )


def distinct_maps(model: AnomalyModel) -> list[str]:
    """Return the model's maps, one of those that are equal."""
    shared = {MAPS[name].compute: name for name in reversed(model.map_names)}
    return list(reversed(shared.values()))


def descriptions(model: AnomalyModel) -> dict[str, str]:
    """Return what each signal of a model measures, by name."""
    return {name: SIGNALS[name].description for name in model.signal_names}


def _standardized(model: AnomalyModel, signals: Mapping[str, float]) -> dict[str, float]:
    calibration = model.calibrated()
    return {
        name: float(calibration.standardize(name, np.asarray(value)))
        for name, value in signals.items()
        if name in calibration.mean
    }


def _examples(
    model: AnomalyModel, images: Tensor | None, records: Sequence[Record], scores: Sequence[float], signal: str
) -> list[Example]:
    """Return examples with all maps; the one over the input is that of `signal`, or of a signal whose map localizes."""
    if images is None:
        return []
    own = [name for name in (signal, *model.map_names) if name in model.map_names]
    shown = next((name for name in own if MAPS[name].localizes), own[0] if own else "")
    # Padded to no more than there are: one image would cost as much as sixteen, and pictures show no last digits.
    size = min(BATCH, len(images))
    rebuilt = model.pictures(images).get("reconstruction")
    maps = {name: heat.numpy() for name, heat in model.several_maps(images, model.map_names, batch_size=size).items()}
    return [
        Example(
            path=record.path,
            finding=record.finding,
            label=record.label,
            score=scores[i],
            input=images[i, 0].numpy(),
            reconstruction=None if rebuilt is None else rebuilt[i].numpy(),
            heat_map=maps[shown][i] if shown else None,
            heat_name=shown,
            maps={name: heat[i] for name, heat in maps.items()},
            details=_details(record),
        )
        for i, record in enumerate(records)
    ]


def _details(record: Record) -> dict[str, object]:
    """Return how the file was decoded, in words for a reader."""
    about = dict(record.provenance)
    shown: dict[str, object] = {"format": about.pop("format", "")}
    rows, columns = about.pop("rows", None), about.pop("columns", None)
    if rows is not None:
        shown["size"] = f"{columns} x {rows} pixels"
    shown |= {name.replace("_", " "): value for name, value in about.items()}
    return {name: value for name, value in shown.items() if value != ""}


def _stacked(images: Sequence[np.ndarray]) -> Tensor | None:
    """Return images `[H, W]` as a batch `[B, 1, H, W]`; None where there is none."""
    return torch.from_numpy(np.stack(images)[:, None]) if images else None

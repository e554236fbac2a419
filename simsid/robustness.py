"""How a model's figures change when its images come from other equipment: simulated shifts of labelled images."""

import dataclasses
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simsid import metrics
from simsid.arguments import require_instance
from simsid.data import ImageSet
from simsid.errors import InputError
from simsid.evaluation import Evaluation
from simsid.models.base import AnomalyModel
from simsid.models.feature_jitter import gaussian_blur, moved
from simsid.models.scorer import BATCH

SIDE = 224
"""Pixels of the image's side to which the sigma of a blur refers."""


@dataclass(frozen=True)
class SimulatedShift:
    """One way in which other equipment changes an image.

    Args:
        name: its name in tables.
        unit: what a strength means.
        strengths: the strengths that are measured.
        apply: images `[B, 1, H, W]` in 0..1, a strength and uniform numbers `[B, 5]` in -1..1 to changed images.
    """

    name: str
    unit: str
    strengths: tuple[float, ...]
    apply: Callable[[Tensor, float, Tensor], Tensor]


@dataclass(frozen=True)
class ShiftRow:
    """The figures of one signal under one shift; `shift` is `"none"` and `strength` 1 for the images as they are.

    `false_positive_rate` and `sensitivity` stand at the threshold of the model's held-out normal images, which were not
    shifted; None where it has none.
    """

    shift: str
    strength: float
    signal: str
    auc: float
    low: float  # 95 % confidence interval of the AUC
    high: float
    false_positive_rate: float | None
    sensitivity: float | None


def _gamma(images: Tensor, strength: float, draws: Tensor) -> Tensor:  # noqa: ARG001
    return images**strength


def _contrast(images: Tensor, strength: float, draws: Tensor) -> Tensor:  # noqa: ARG001
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * strength + mean


def _blur(images: Tensor, strength: float, draws: Tensor) -> Tensor:  # noqa: ARG001
    sigma = strength * max(images.shape[2:]) / SIDE
    radius = min(max(1, round(3 * sigma)), min(images.shape[2:]) - 1)
    return gaussian_blur(images, torch.full((len(images),), sigma), radius)


def _affine(images: Tensor, strength: float, draws: Tensor) -> Tensor:
    return moved(images, strength * draws)


def _jpeg(images: Tensor, strength: float, draws: Tensor) -> Tensor:  # noqa: ARG001
    decoded = []
    for pixels in (images * 255).round().to(torch.uint8)[:, 0].numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=int(strength))
        decoded.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(decoded))[:, None] / 255


SHIFTS = (
    SimulatedShift("gamma", "exponent of gray values in 0..1", (0.5, 0.7, 1.4, 2.0), _gamma),
    SimulatedShift("contrast", "factor about the image's mean, clipped", (0.5, 0.7, 1.4, 2.0), _contrast),
    SimulatedShift("blur", "sigma of a Gaussian, pixels of 224", (0.5, 1.0, 2.0), _blur),
    SimulatedShift("affine", "draws within this times 10 % zoom, 6 degrees, 5 % shift", (0.5, 1.0, 2.0), _affine),
    SimulatedShift("JPEG", "quality", (50, 20, 10), _jpeg),
)
"""The shifts that are measured, and their strengths."""


def shifted(images: ImageSet, shift: SimulatedShift, strength: float, seed: int = 0) -> Iterator[Tensor]:
    """Yield shifted images in batches `[b, 1, H, W]` in -1..1; the same seed moves each image alike."""
    draws = torch.rand(len(images), 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    for batch, part in zip(images.batches(BATCH), draws.split(BATCH)):
        unit = ((batch.cpu() + 1) / 2).clamp(0, 1)
        yield shift.apply(unit, strength, part).clamp(0, 1) * 2 - 1


def evaluate_shifts(
    model: AnomalyModel, images: ImageSet, evaluation: Evaluation, *, seed: int = 0, progress: bool = False
) -> list[ShiftRow]:
    """Measure every signal on labelled images as they are, and under each shift at each strength.

    Args:
        model: any calibrated model.
        images: labelled images, normal and abnormal; all of them are shifted.
        evaluation: `simsid.evaluation.evaluate` of this model and these images; its thresholds are used throughout.
        seed: of the affine draws.
        progress: whether to show a bar.

    Raises:
        InputError: the evaluation is of other images.
    """
    from tqdm import tqdm

    require_instance("model", model, AnomalyModel)
    if images.paths != evaluation.paths:
        raise InputError(f"evaluation must be of these {len(images)} images, got one of {len(evaluation.paths)} others")
    rows = _rows("none", 1.0, evaluation)
    cases = [(shift, strength) for shift in SHIFTS for strength in shift.strengths]
    for shift, strength in tqdm(cases, desc="shifts", disable=not progress, dynamic_ncols=True):
        signals = model.signals(shifted(images, shift, strength, seed))
        rows += _rows(shift.name, strength, dataclasses.replace(evaluation, signals=signals))
    return rows


def _rows(shift: str, strength: float, evaluation: Evaluation) -> list[ShiftRow]:
    thresholds, labels, rows = evaluation.thresholds(), evaluation.labels, []
    for signal, scores in evaluation.signals.items():
        area = metrics.auc(labels, scores)
        flagged = None if signal not in thresholds else scores > thresholds[signal]
        rates = [None if flagged is None else float(flagged[labels == label].mean()) for label in (0, 1)]
        rows.append(ShiftRow(shift, float(strength), signal, area.value, area.low, area.high, *rates))
    return rows


def format_shifts(rows: list[ShiftRow], signal: str) -> str:
    """Lay the figures of one signal out as plain text, one line a shift and strength."""
    lines = [f"{signal}: false positive rate and sensitivity at the threshold from images that are not shifted", ""]
    lines.append(f"{'shift':10}{'strength':>8}{'AUC':>8}  {'95 % interval':13}{'FPR':>8}{'sens.':>8}")
    for row in rows:
        if row.signal == signal:
            rates = "".join(
                f"{'-' if rate is None else f'{rate:.3f}':>8}" for rate in (row.false_positive_rate, row.sensitivity)
            )
            strength = "-" if row.shift == "none" else f"{row.strength:g}"
            interval = f"{row.low:.3f} - {row.high:.3f}"
            lines.append(f"{row.shift:10}{strength:>8}{row.auc:8.3f}  {interval:13}{rates}")
    return "\n".join(lines)

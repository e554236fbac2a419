"""What the benchmarks of the whole model compare: ways to train and to score, and the images they run on."""

import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import measure
import numpy as np
import torch
from baseline import Baseline, BaselineStep, all_signals, location_units
from ops import COMPILES_SLOWLY, NEEDS_CUDA
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from simsid import Config, Model, TrainingConfig
from simsid.data import Radiographs, stream_images
from simsid.kernels.backend import why_not_triton
from simsid.models.scorer import BATCH
from simsid.precision import bfloat16_instructions
from simsid.scoring.stream import Score, score_files
from simsid.training.step import TrainingStep

METHODS = {"SimSID": Config.simsid, "SQUID": Config.squid}
PAPERS = {"training": {"SimSID": 11.0, "SQUID": 28.2}, "inference": {"SimSID": 9.0, "SQUID": 9.5}}
"""Seconds of a training epoch and of an inference pass over ZhangLab.

Source: the comparison with SQUID in SimSID (arXiv 2403.08689).
"""

BASELINE, PRODUCT = "baseline", "simsid"
PRODUCT_BF16 = "simsid, bf16"
NEEDS_BF16 = "bfloat16 is timed on CUDA and on CPUs with instructions for it"
IMAGE_SIZE = (1200, 1000)  # columns and rows of a generated image

Step = Callable[[Tensor, int], None]
Scorer = Callable[[Tensor], dict[str, np.ndarray]]


class Variant(NamedTuple):
    """One way to compute the model with the weights of the baseline; `needs` is the reason to skip it on a CPU."""

    fused: bool | str = False
    options: Mapping[str, object] = MappingProxyType({})
    needs: str | None = None


GRAPH, EAGER, COMPILED, BF16 = (
    {"cuda_graph": True, "precision": "float32"},
    {"cuda_graph": False, "precision": "float32"},  # which the default is not on every CPU
    {"cuda_graph": False, "compile": True, "precision": "float32"},
    {"precision": "bfloat16"},
)
VARIANTS = {
    BASELINE: Variant(),
    "eager": Variant(False, EAGER),
    "eager, torch.compile": Variant(False, COMPILED, COMPILES_SLOWLY),
    "fused": Variant(True, EAGER, NEEDS_CUDA),
    "fused, CUDA graph": Variant(True, GRAPH, NEEDS_CUDA),
    "eager, bf16": Variant(False, EAGER | BF16, NEEDS_BF16),
    "eager, torch.compile, bf16": Variant(False, COMPILED | BF16, NEEDS_BF16),
    "fused, bf16": Variant(True, EAGER | BF16, NEEDS_BF16),
    "fused, CUDA graph, bf16": Variant(True, GRAPH | BF16, NEEDS_BF16),
    PRODUCT: Variant("auto", {"precision": "float32"}),
    PRODUCT_BF16: Variant("auto", BF16, NEEDS_BF16),
}


def why_skipped(variant: Variant, device: torch.device, compiles: bool) -> str | None:
    """Return why `variant` cannot be timed here, or None; `compiles` allows torch.compile on any device."""
    has_bf16 = device.type == "cuda" or bool(bfloat16_instructions())
    if variant.needs == COMPILES_SLOWLY or variant.options.get("compile"):
        if not compiles:
            return "torch.compile of the whole model takes minutes; --compile allows it"
        return variant.needs if variant.needs == NEEDS_BF16 and not has_bf16 else None
    if device.type == "cuda":
        return why_not_triton(device) if variant.fused is True else None
    if variant.fused is True:
        return NEEDS_CUDA
    return None if variant.needs == NEEDS_BF16 and has_bf16 else variant.needs


def build(
    method: str, width: int, device: torch.device, fused: bool | str = False, precision: str = "float32"
) -> Model:
    """Return an untrained model, calibrated on noise in `precision`; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model(METHODS[method](width=width), fused=fused)
        model.precision = precision
        model.calibrate(noise(BATCH, model.config.image_size))
    return model.to(device)


def noise(count: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Return images `[count, 1, size, size]` in -1..1, smooth like radiographs."""
    coarse = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    fine = torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(2))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    return torch.tanh(smooth + 0.1 * fine).to(device)


# Training --------------------------------------------------------------------------------------------------------


def training_step(name: str, model: Model, **options: object) -> BaselineStep | TrainingStep:
    """Return what runs an iteration on `model`, whose `fused` must be that of the variant."""
    model.train()
    if name == BASELINE:
        return BaselineStep(model, TrainingConfig(**options))
    return TrainingStep(model, TrainingConfig(**VARIANTS[name].options, **options))


# Scoring ---------------------------------------------------------------------------------------------------------


def scorer(name: str, model: Model, batch: int) -> Scorer:
    """Return what computes every signal of `[n, 1, H, W]`, n a multiple of `batch`."""
    if name == BASELINE:
        return functools.partial(Baseline(model).signals, batch_size=batch)
    if name in (PRODUCT, PRODUCT_BF16):
        # The layout in which a training leaves the model and `Model.load` restores it.
        model.to(memory_format=torch.channels_last)
        return functools.partial(model.freeze(VARIANTS[name].options["precision"]).signals, batch_size=batch)
    return _vectorized(model.eval(), batch, **VARIANTS[name].options)


def _vectorized(
    model: Model, batch: int, cuda_graph: bool = False, compile: bool = False, precision: str = "float32"
) -> Scorer:
    """Score through `Model.forward`, without anything that `Model.freeze` does for inference."""
    units = location_units(model)

    def compute(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            outputs = model(images)
            logits = model.discriminator(outputs.student, "per_image"), model.discriminator(outputs.student)
        found = all_signals(images, outputs, *logits, units)
        return torch.stack([found[name].double() for name in model.signal_names])

    if compile:
        compute = torch.compile(compute, dynamic=False)
    if cuda_graph:
        compute = _replayed(compute, batch, model)

    @torch.no_grad()
    def score(images: Tensor) -> dict[str, np.ndarray]:
        columns = torch.cat([compute(part) for part in images.split(batch)], dim=1).cpu().numpy()
        return dict(zip(model.signal_names, columns))

    return score


def _replayed(compute: Callable[[Tensor], Tensor], batch: int, model: Model) -> Callable[[Tensor], Tensor]:
    outputs, images = [], noise(batch, model.config.image_size, model.device)
    with measure.on_stream(), torch.no_grad():
        graph = measure.capture([lambda: outputs.append(compute(images))])

    def replay(batch_of_images: Tensor) -> Tensor:
        images.copy_(batch_of_images)
        graph.replay()
        return outputs[-1].clone()

    return replay


def folder_scorer(name: str, model: Model, batch: int) -> Callable[[list[str]], list[Score]]:
    """Return what scores files, from reading them to one row each."""
    if name == BASELINE:
        return lambda files: list(Baseline(model).score_files(files, batch))
    score = scorer(name, model, batch)
    if name in (PRODUCT, PRODUCT_BF16):
        return lambda files: list(score_files(model, files, batch_size=batch))

    def rows(files: list[str]) -> Iterator[Score]:
        for images, records, _ in stream_images(files, **model.preprocessing.to_dict(), batch_size=batch):
            signals = score(images.to(model.device))
            probability = model.calibrated().probability(model.signal, signals[model.signal])
            for i, record in enumerate(records):
                values = {key: float(column[i]) for key, column in signals.items()}
                yield Score(record.path, score=float(probability[i]), signals=values)

    return lambda files: list(rows(files))


# Work ------------------------------------------------------------------------------------------------------------


@functools.cache
def gflop(op: str, method: str, width: int, baseline: bool) -> float:
    """Return the floating-point operations per image of convolutions and matrix products, in units of 1e9.

    Of a training step, the mean of an iteration with the generator and one without. Counted, not derived; a
    multiplication and an addition are two operations.
    """
    images = 2
    model = build(method, width, torch.device("cpu"))
    batch = noise(images, model.config.image_size)
    name = BASELINE if baseline else "eager"
    counter = FlopCounterMode(display=False)
    if op == "train_step":
        step = training_step(name, model)
        with counter:
            step(batch, 0)
            step(batch, 1)
        return counter.get_total_flops() / 2 / images / 1e9
    score = scorer(name, model, images)
    with counter:
        score(batch)
    return counter.get_total_flops() / images / 1e9


# Images ----------------------------------------------------------------------------------------------------------


def write_images(folder: pathlib.Path, count: int) -> pathlib.Path:
    """Write 8-bit JPEG files of the size of a radiograph, smooth and grainy, the same ones every time."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(40, 216, (10, 8), dtype=np.uint8))
        smooth = coarse.resize(IMAGE_SIZE, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(4))
        grainy = np.asarray(smooth, np.float32) + rng.normal(0, 4, IMAGE_SIZE[::-1])
        pixels = np.clip(grainy, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"image{number:04d}.jpeg", quality=90)
    return folder


def files_of(folder: pathlib.Path, count: int | None) -> list[str]:
    """Return the first `count` files of a folder, or all."""
    return [record.path for record in Radiographs(folder).select()][:count]

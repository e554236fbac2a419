"""What is compared of the whole model: ways to run a training step and to score, and the films they run on."""

import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from baseline import Baseline, BaselineStep, all_signals
from measure import capture
from ops import COMPILES_SLOWLY, NEEDS_CUDA
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from simsid import Config, Model, TrainingConfig
from simsid.data import Radiographs, stream_images
from simsid.kernels.backend import why_not_triton
from simsid.models.model import BATCH
from simsid.scoring.stream import Score, preparation, score_files
from simsid.training.step import TrainingStep

METHODS = {"SimSID": Config.simsid, "SQUID": Config.squid}
PAPERS = {"training": {"SimSID": 11.0, "SQUID": 28.2}, "inference": {"SimSID": 9.0, "SQUID": 9.5}}
"""Seconds of one epoch of training and one pass of inference over ZhangLab. Source: SimSID's comparison with SQUID."""

BASELINE, PRODUCT = "baseline", "simsid"
NEEDS_TENSOR_CORES = "bfloat16 is timed on CUDA"
FILM = (1200, 1000)  # columns and rows of a generated film

Step = Callable[[Tensor, int], None]
Scorer = Callable[[Tensor], dict[str, np.ndarray]]


class Variant(NamedTuple):
    """One way to compute the model that has the baseline's weights; `needs` is the reason to leave it out elsewhere."""

    fused: bool | str = False
    options: Mapping[str, object] = MappingProxyType({})
    needs: str | None = None


GRAPH, EAGER, COMPILED, BF16 = (
    {"cuda_graph": True},
    {"cuda_graph": False},
    {"cuda_graph": False, "compile": True},
    {"precision": "bfloat16"},
)
VARIANTS = {
    BASELINE: Variant(),
    "eager": Variant(False, EAGER),
    "eager, torch.compile": Variant(False, COMPILED, COMPILES_SLOWLY),
    "fused": Variant(True, EAGER, NEEDS_CUDA),
    "fused, CUDA graph": Variant(True, GRAPH, NEEDS_CUDA),
    "eager, bf16": Variant(False, EAGER | BF16, NEEDS_TENSOR_CORES),
    "eager, torch.compile, bf16": Variant(False, COMPILED | BF16, NEEDS_TENSOR_CORES),
    "fused, bf16": Variant(True, EAGER | BF16, NEEDS_TENSOR_CORES),
    "fused, CUDA graph, bf16": Variant(True, GRAPH | BF16, NEEDS_TENSOR_CORES),
    PRODUCT: Variant("auto"),
}


def left_out(variant: Variant, device: torch.device, compiles: bool) -> str | None:
    """Return why `variant` cannot be timed here, or None; `compiles` allows torch.compile on a CPU."""
    if device.type == "cuda":
        return why_not_triton(device) if variant.fused is True else None
    return None if compiles and variant.needs == COMPILES_SLOWLY else variant.needs


def build(method: str, width: int, device: torch.device, fused: bool | str = False) -> Model:
    """Return an untrained model, calibrated on noise; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model(METHODS[method](width=width), fused=fused)
        model.calibrate(noise(BATCH, model.config.image_size))
    return model.to(device)


def noise(count: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Return `[count, 1, size, size]` in -1..1, smooth as films are."""
    coarse = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    fine = torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(2))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    return torch.tanh(smooth + 0.1 * fine).to(device)


# Training --------------------------------------------------------------------------------------------------------


def training_step(name: str, model: Model, **options: object) -> BaselineStep | TrainingStep:
    """Return what runs an iteration on `model`, whose `fused` must be the variant's."""
    model.train()
    if name == BASELINE:
        return BaselineStep(model, TrainingConfig(**options))
    return TrainingStep(model, TrainingConfig(**VARIANTS[name].options, **options))


# Scoring ---------------------------------------------------------------------------------------------------------


def scorer(name: str, model: Model, batch: int) -> Scorer:
    """Return what gives every signal of `[n, 1, H, W]`, n a multiple of `batch`."""
    if name == BASELINE:
        return functools.partial(Baseline(model).signals, batch_size=batch)
    if name == PRODUCT:
        # As a training leaves it and `Model.load` restores it.
        model.to(memory_format=torch.channels_last)
        return functools.partial(model.signals, batch_size=batch)
    return _vectorised(model.eval(), batch, **VARIANTS[name].options)


def _vectorised(
    model: Model, batch: int, cuda_graph: bool = False, compile: bool = False, precision: str = "float32"
) -> Scorer:
    """Score through `Model.forward`, which knows nothing of what `Model.signals` does for inference."""

    def compute(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            found = model(images)
            logits = model.discriminator(found.student, "per_image"), model.discriminator(found.student)
        return torch.stack([values.double() for values in all_signals(images, found, *logits).values()])

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
    kept, size = [], model.config.image_size
    images = noise(batch, size, model.device)
    with torch.no_grad():
        graph = capture(lambda images: kept.append(compute(images)), [(images,)])

    def replay(given: Tensor) -> Tensor:
        images.copy_(given)
        graph.replay()
        return kept[-1].clone()

    return replay


def folder_scorer(name: str, model: Model, batch: int) -> Callable[[list[str]], list[Score]]:
    """Return what scores files, from reading them to one row each."""
    if name == BASELINE:
        return lambda files: list(Baseline(model).score_files(files, batch))
    score = scorer(name, model, batch)
    if name == PRODUCT:
        return lambda files: list(score_files(model, files, batch_size=batch))

    def rows(files: list[str]) -> Iterator[Score]:
        for images, records, _ in stream_images(files, **preparation(model), batch_size=batch):
            found = score(images.to(model.device))
            probability = model.calibrated().probability(model.signal, found[model.signal])
            for i, record in enumerate(records):
                values = {key: float(column[i]) for key, column in found.items()}
                yield Score(record.path, score=float(probability[i]), signals=values)

    return lambda files: list(rows(files))


# Work ------------------------------------------------------------------------------------------------------------


@functools.cache
def gflop(group: str, method: str, width: int, baseline: bool) -> float:
    """Return the convolutions' and matrix products' floating-point operations an image, in units of 1e9.

    Of a training step: the mean of an iteration with the generator and one without. Counted, not derived:
    a multiplication and an addition are two operations.
    """
    images = 2
    model = build(method, width, torch.device("cpu"))
    batch = noise(images, model.config.image_size)
    name = BASELINE if baseline else "eager"
    counter = FlopCounterMode(display=False)
    if group == "train_step":
        step = training_step(name, model)
        with counter:
            step(batch, 0)
            step(batch, 1)
        return counter.get_total_flops() / 2 / images / 1e9
    score = scorer(name, model, images)
    with counter:
        score(batch)
    return counter.get_total_flops() / images / 1e9


# Films -----------------------------------------------------------------------------------------------------------


def write_films(folder: pathlib.Path, count: int) -> pathlib.Path:
    """Write 8-bit JPEG films of a radiograph's size, smooth and grainy, the same ones every time."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(40, 216, (10, 8), dtype=np.uint8))
        smooth = coarse.resize(FILM, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(4))
        grainy = np.asarray(smooth, np.float32) + rng.normal(0, 4, FILM[::-1])
        pixels = np.clip(grainy, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"film{number:04d}.jpeg", quality=90)
    return folder


def films_of(folder: pathlib.Path, count: int) -> list[str]:
    """Return the first `count` films of a folder."""
    return [record.path for record in Radiographs(folder).select()][:count]

"""The model: everything that is trained, saved and scored with."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import NoneType

import numpy as np
import torch
from torch import Tensor, nn

from simsid import checkpoint
from simsid.config import Config
from simsid.errors import CalibrationError, CheckpointError, ConfigError
from simsid.kernels.ranges import stage
from simsid.models import patches
from simsid.models.discriminator import Discriminator
from simsid.models.generator import Encoder, Generator
from simsid.models.inference import InferenceForm
from simsid.models.losses import distillation_loss
from simsid.models.signals import SIGNALS, Calibration

BATCH = 16
"""Images that pass through the network at a time; fewer are filled up, since libraries sum in another order for another
batch size and a score would change in its last digits."""


@dataclass(frozen=True)
class Reconstruction:
    """What `Model.forward` returns in every mode.

    `student` `[B, 1, H, W]` in -1..1; `teacher` likewise and `distillation` (a scalar), or None where the teacher was
    not computed; `query` and `retrieved` `[B, L, D]`: the in-painting block's queries and what its memory returned, or
    None in a model without the block.
    """

    student: Tensor
    teacher: Tensor | None = None
    distillation: Tensor | None = None
    query: Tensor | None = None
    retrieved: Tensor | None = None


class Model(nn.Module):
    """Encoder, student and teacher generator, and discriminator of SimSID or SQUID, with their calibration.

        A = 1 - sigmoid((D(student(I)) - mu) / sigma)          1 is anomalous

    Source: SimSID (arXiv 2403.08689), figure 2 and section 3; SQUID (arXiv 2111.13495), figure 2 and section 3.

    Args:
        config: a `Config`; None is `Config()`, SimSID as published.
        fused: True or `"auto"`: fused kernels where the tensors are on CUDA and PyTorch elsewhere; False: PyTorch
            everywhere.
        **overrides: single fields of the configuration, as in `Model(width=8)`.

    Raises:
        ConfigError: a configuration that cannot be built; the message names the field.
    """

    def __init__(self, config: Config | None = None, *, fused: bool | str = "auto", **overrides: object) -> None:
        super().__init__()
        if fused not in (True, False, "auto"):
            raise ConfigError(f"fused must be True, False or 'auto', got {fused!r}")
        if not isinstance(config, (Config, NoneType)):
            raise ConfigError(f"config must be a Config, got {config!r}")
        self.config = config = (config or Config()).replace(**overrides)
        self.fused = fused
        backend = "auto" if fused else "torch"
        self.encoder = Encoder(config)
        self.student = Generator(config, student=True, backend=backend)
        self.teacher = Generator(config, student=False) if config.distillation else None
        self.discriminator = Discriminator(config.image_size)
        self.calibration: Calibration | None = None
        self._form: InferenceForm | None = None
        self._moved = False

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def queue(self) -> nn.Module | None:
        """The in-painting block's memory where it is a queue that training must feed, else None."""
        block = self.student.inpainting
        return block.memory if block is not None and block.memory.is_queue else None

    @property
    def signal(self) -> str:
        """The full name of the signal that `score` uses, one of `simsid.models.signals.SIGNALS`."""
        name = self.config.signal
        return f"{name}_{self.config.score_statistics}" if name == "discriminator" else name

    @property
    def signal_names(self) -> tuple[str, ...]:
        """The signals this model has; without an in-painting block there is no memory distance."""
        return tuple(name for name in SIGNALS if name != "memory_distance" or self.student.inpainting is not None)

    def forward(self, images: Tensor, teacher: bool | None = None) -> Reconstruction:
        """Reconstruct `[B, 1, H, W]` in -1..1; `teacher=None` computes the teacher in training mode only."""
        self._check(images)
        P = self.config.patches
        shown = images
        if self.training and self.config.pixel_inpainting:
            shown = self._blank(images)
        encoded = self.encoder(patches.split(shown, P))
        with stage("student"):
            student = self.student(encoded.deepest, encoded.skips)
        found = {"student": student.images, "query": student.query, "retrieved": student.retrieved}
        if self.teacher is not None and (self.training if teacher is None else teacher):
            deepest, skips = encoded
            if self.config.stop_gradient:
                deepest, skips = deepest.detach(), [skip.detach() for skip in skips]
            with stage("teacher"):
                taught = self.teacher(deepest, skips)
            found["teacher"] = taught.images
            with stage("distillation"):
                found["distillation"] = distillation_loss(student.features, taught.features)
        return Reconstruction(**found)

    def train(self, mode: bool = True) -> "Model":
        """Switch between training and inference mode.

        Call it, or `eval`, after changing weights through `.data`, which PyTorch does not count: scoring in inference
        mode follows all other changes by itself.
        """
        # Replayed graphs change weights unnoticed too.
        self._moved = True
        return super().train(mode)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Return the student's reconstruction of `[B, 1, H, W]` in inference mode, on the images' device."""
        form, found = self._inference_form(), []
        for batch, count in self._batches(images):
            with form.lock:
                found.append(form.reconstruct(batch)[:count].to(images.device, copy=True))
        return torch.cat(found)

    def signals(
        self, images: Tensor | Iterable[Tensor], names: Iterable[str] | None = None, *, batch_size: int = BATCH
    ) -> dict[str, np.ndarray]:
        """Return the raw signals of `[B, 1, H, W]`: name to `[B]`, float64, higher is more anomalous.

        Nothing is normalised across images, so an image's values do not depend on its neighbours. Every batch has one
        size, the last is filled up: the values do not depend on the number of images either.

        Args:
            images: images in -1..1, or an iterable of such batches (a loader).
            names: the signals wanted; None is every one of `signal_names`.
            batch_size: images that pass through the network at a time. Another size moves the last digits, as libraries
                then sum in another order: scores that are compared need one size.
        """
        return self.launch_signals(images, names, batch_size=batch_size)()

    @torch.inference_mode()
    def launch_signals(
        self, images: Tensor | Iterable[Tensor], names: Iterable[str] | None = None, *, batch_size: int = BATCH
    ) -> Callable[[], dict[str, np.ndarray]]:
        """Start computing what `signals` returns; the function returned waits for a GPU and returns it."""
        names = tuple(self.signal_names if names is None else names)
        for name in names:
            if name not in self.signal_names:
                raise ValueError(f"signal must be one of {', '.join(self.signal_names)}, got {name!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        columns: dict[str, list[Tensor]] = {name: [] for name in names}
        form = self._inference_form()
        for part in [images] if isinstance(images, Tensor) else images:
            for batch, count in self._batches(part, batch_size):
                with form.lock:
                    found = form.signals(batch, names)
                    for name in names:
                        # A copy, still on the device: the next batch is under way before this one is waited for.
                        columns[name].append(found[name][:count].to(torch.float64, copy=True))
        found = {name: torch.cat(values) if values else torch.zeros(0) for name, values in columns.items()}
        return lambda: {name: values.double().cpu().numpy() for name, values in found.items()}

    def score(self, images: Tensor) -> Tensor:
        """Return the anomaly score of `[B, 1, H, W]`: `[B]` float64 in 0..1, 1 is anomalous.

        The score is the configured signal, standardised on normal films. Rank and threshold on `signals` instead: the
        sigmoid ties scores far from the mean.

        Raises:
            CalibrationError: the model has not been calibrated.
        """
        raw = self.signals(images, [self.signal])[self.signal]
        return torch.from_numpy(self.calibrated().probability(self.signal, raw)).to(images.device)

    def calibrated(self) -> Calibration:
        """Return the calibration, or say what is missing."""
        if self.calibration is None:
            raise CalibrationError(
                "the model is not calibrated: call calibrate(images) with normal images, or finish its training"
            )
        return self.calibration

    def calibrate(self, images: Tensor | Iterable[Tensor], holdout: Tensor | Iterable[Tensor] | None = None) -> None:
        """Measure mean and deviation of every signal on normal training images, un-augmented.

        Args:
            images: `[n, 1, H, W]` in -1..1, or an iterable of such batches (a loader).
            holdout: normal images that were not trained on, for thresholds at a chosen false-alarm rate.
        """
        kept = None if holdout is None else self.signals(holdout)
        self.calibration = Calibration.fit(self.signals(images), kept)

    def save(self, folder: str | os.PathLike) -> None:
        """Write weights, configuration and calibration to `folder`, whole or not at all."""
        document = {
            "kind": "simsid model",
            # Libraries sum in another order for another layout; a loaded model scores bit for bit as this one.
            "layout": "channels_last" if self._is_channels_last() else "contiguous",
            "config": self.config.to_dict(),
            "calibration": self.calibration.to_dict() if self.calibration else None,
        }
        checkpoint.write(folder, "model", self.state_dict(), document)

    @classmethod
    def load(
        cls, folder: str | os.PathLike, *, fused: bool | str = "auto", device: str | torch.device = "cpu"
    ) -> "Model":
        """Read a model that `save` or a training run wrote, in inference mode; nothing in the files is executed.

        Raises:
            CheckpointError: the folder holds no model, a damaged one, or one of other shapes.
        """
        tensors, document = checkpoint.read(folder, "model")
        try:
            config = Config.from_dict(document["config"])
            calibration = Calibration.from_dict(document["calibration"]) if document["calibration"] else None
        except KeyError as error:
            raise CheckpointError(f"{os.fspath(folder)}/model.json is not a model: no {error}") from None
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{os.fspath(folder)}/model.json is not a model: {error}") from None
        with torch.random.fork_rng(devices=[]):
            model = cls(config, fused=fused)
        checkpoint.load_state(model, tensors, f"{os.fspath(folder)}/model.json")
        if document.get("layout") == "channels_last":
            model.to(memory_format=torch.channels_last)
        model.calibration = calibration
        return model.to(device).eval()

    def _inference_form(self) -> InferenceForm:
        """Return the model as it is scored with, following its weights."""
        # Weights and buffers made in PyTorch's inference mode could not be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            form = self._form
            if form is None or not form.update(self, self._moved):
                form = self._form = InferenceForm(self)
        self._moved = self.training
        return form

    def _batches(self, images: Tensor, size: int = BATCH) -> Iterator[tuple[Tensor, int]]:
        """Yield batches of one size on the model's device, and how many images of each are not filling."""
        self._check(images)
        dtype = next(self.parameters()).dtype
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            if self.device.type == "cuda" and not batch.is_cuda:
                # From pinned memory, or the host would wait for all that the device still has to do.
                batch = batch.pin_memory()
            batch = batch.to(self.device, dtype, non_blocking=True)
            count = len(batch)
            if count < size:
                batch = torch.cat([batch, batch[-1:].expand(size - count, -1, -1, -1)])
            yield batch, count

    def _blank(self, images: Tensor) -> Tensor:
        """Zero the configured share of each image's patches."""
        P, L = self.config.patches, self.config.locations
        order = torch.rand(len(images), L, device=images.device).argsort(1)
        blank = (order < round(self.config.pixel_inpainting * L)).view(-1, 1, P, P)
        S = self.config.patch_size
        return images.masked_fill(blank.repeat_interleave(S, 2).repeat_interleave(S, 3), 0.0)

    def _is_channels_last(self) -> bool:
        weight = self.discriminator.convolutions[1].weight
        return weight.is_contiguous(memory_format=torch.channels_last)

    def _check(self, images: Tensor) -> None:
        size = self.config.image_size
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a floating-point tensor with values in -1..1, got {got}")
        if images.dim() != 4 or images.shape[1:] != (1, size, size) or not len(images):
            raise ValueError(f"images must have shape [B, 1, {size}, {size}], B at least 1, got {list(images.shape)}")

    def _apply(self, *arguments: object, **options: object) -> "Model":
        # Weights that move to another device leave nothing behind.
        self._form = None
        return super()._apply(*arguments, **options)

    def __getstate__(self) -> dict[str, object]:
        """Leave out what is made again where it is needed, so that copies are the model alone."""
        return {**self.__dict__, "_form": None}

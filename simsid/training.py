"""Training: the alternating updates of generator and discriminator, and a run that survives being killed."""

import copy
import dataclasses
import hashlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from simsid import checkpoint, metrics
from simsid.config import TrainingConfig
from simsid.data import ImageSet, augment
from simsid.losses import adversarial_loss, reconstruction_loss
from simsid.model import Model
from simsid.runs import RunError, RunFolder


class NonFiniteError(FloatingPointError):
    """Images, a loss or a gradient are NaN or infinite; nothing was updated with them, the last checkpoint is whole."""


@dataclass
class History:
    """What a training went through: one dictionary an epoch (losses, validation), and the epoch that was kept."""

    epochs: list[dict[str, object]] = field(default_factory=list)
    best_epoch: int | None = None
    """The epoch whose weights the model has, counted from 0."""
    best_value: float | None = None
    """The criterion there, higher is better: the AUC, or the reconstruction error negated."""
    interrupted: bool = False
    """Whether Ctrl-C ended the training before its time."""


@dataclass
class _Progress:
    """Where training stands; together with weights and optimisers, all that a resume needs."""

    epoch: int = 0
    position: int = 0
    """Iterations done in this epoch."""
    step: int = 0
    """Iterations done in all."""
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    history: History = field(default_factory=History)
    finished: bool = False

    def add(self, losses: dict[str, float]) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items()}


class Trainer:
    """Trains a model: cosine schedule, alternating updates, validation, checkpoints, early stopping.

    Every iteration updates the discriminator (real, then fake, each normalised with its own batch); every second one
    then updates the generator on the same reconstruction. All that is drawn in an iteration comes from a seed made of
    `config.seed` and the iteration's number, so that a resumed run repeats an uninterrupted one.
    Source: SimSID, section 3.5 and 4.2.

    Args:
        model: trained in place, on the device it is on.
        config: a `TrainingConfig`; None is the papers'.
        run: a folder for metrics and checkpoints, or None to keep everything in memory.
        progress: show a progress bar.

    Raises:
        RunError: `config.tensorboard` without a run folder or without TensorBoard.
    """

    def __init__(
        self,
        model: Model,
        config: TrainingConfig | None = None,
        *,
        run: RunFolder | str | os.PathLike | None = None,
        progress: bool = False,
    ) -> None:
        self.model = model.to(memory_format=torch.channels_last)
        self.config = config = config or TrainingConfig()
        self.run = run
        self.progress = progress
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._optimizers: dict[str, torch.optim.Adam] = {}
        self._interrupted = False
        self._best: dict[str, Tensor] | None = None
        self._saved = 0.0
        if config.tensorboard:
            # Here, not hours later or after a long reading of images.
            if run is None:
                raise RunError("tensorboard=True needs a run folder to write into")
            _summary_writer()

    def fit(self, train: ImageSet | Tensor, val: ImageSet | Tensor | None = None, *, resume: bool = False) -> History:
        """Train on `train`, keep the best epoch by the criterion on `val`, calibrate, and return the history.

        All images of `train` are trained on: hand over normal ones. The model ends with the best epoch's weights, in
        inference mode, calibrated on `train` (un-augmented), with the normal images of `val` held out for thresholds.
        After Ctrl-C the state is written, the model stays as it is, and `History.interrupted` is set.

        Args:
            train: images, an `ImageSet` or `[n, 1, H, W]` in -1..1; at least 2.
            val: images to validate on, those with label 1 as anomalies; None validates nothing.
            resume: go on from the run folder's state, or from the beginning where it was stopped before it wrote one;
                the same images and configuration must be given.

        Raises:
            ValueError: images that do not fit the model, or a criterion that `val` cannot give.
            NonFiniteError: images, a loss or a gradient are not finite; the last checkpoint is whole.
            RunError: the run folder is in use, already holds a run or a model, or holds another run.
        """
        train, val = _as_images(train), _as_images(val) if val is not None and len(val) else None
        criterion = self._criterion(train, val)
        if self.run is None:
            if resume:
                raise RunError("resume=True needs the run folder to resume")
            return self._fit(train, val, criterion, None, resume=False)
        held = nullcontext(self.run) if isinstance(self.run, RunFolder) else RunFolder(self.run)
        with held as folder:
            return self._fit(train, val, criterion, folder, resume=resume)

    def _fit(
        self, train: ImageSet, val: ImageSet | None, criterion: str, folder: RunFolder | None, *, resume: bool
    ) -> History:
        at, fingerprint = _Progress(), _fingerprint(train, val)
        self._optimizers, self._best = self._fresh_optimizers(), None
        # What normal films look like to other weights; none of the epochs kept on the way may carry it.
        self.model.calibration = None
        if folder is not None:
            if resume and folder.started:
                at = self._restore(folder, fingerprint)
            elif not resume and folder.taken:
                raise RunError(f"{folder.path} already holds a run or a model; resume it or choose another folder")
            folder.write_metrics(at.history.epochs)
        if at.finished:
            self._load_best(folder)
            return at.history
        with (
            self._graceful_interrupt(),
            torch.random.fork_rng(devices=self._cuda_devices()),
            self._writer(folder, at) as board,
        ):
            if self._epochs(train, val, criterion, folder, at, fingerprint, board):
                self._load_best(folder)
                at.finished = True
                self._calibrate(train, val, folder, at, fingerprint)
        self.model.eval()
        return at.history

    def _epochs(
        self,
        train: ImageSet,
        val: ImageSet | None,
        criterion: str,
        folder: RunFolder | None,
        at: _Progress,
        fingerprint: str,
        board: object | None,
    ) -> bool:
        """Run the remaining epochs; False when interrupted."""
        config, history = self.config, at.history
        size = min(config.batch_size, len(train))
        per_epoch = len(train) // size
        self._saved = time.monotonic()
        bar = tqdm(
            total=config.epochs * per_epoch,
            initial=at.step,
            disable=not self.progress,
            unit="it",
            smoothing=0.05,
            # In a log file each refresh is a line that stays.
            mininterval=0.1 if sys.stderr.isatty() else 60,
        )
        with bar:
            while at.epoch < config.epochs and not self._patience_over(at):
                began = time.monotonic()
                self._set_learning_rate(at.epoch)
                order = np.random.default_rng([config.seed, 1, at.epoch]).permutation(len(train))
                self.model.train()
                while at.position < per_epoch:
                    if self._interrupted:
                        if folder is not None:
                            self._save_state(folder, at, fingerprint)
                        history.interrupted = True
                        return False
                    index = order[at.position * size : (at.position + 1) * size]
                    at.add(self._step(train.batch(torch.from_numpy(index), self.model.device), at.step))
                    at.position, at.step = at.position + 1, at.step + 1
                    bar.update()
                    if self.progress and at.position % 5 == 0:
                        bar.set_description(f"epoch {at.epoch + 1}/{config.epochs}", refresh=False)
                        postfix = {name: f"{value:.4f}" for name, value in at.means().items()}
                        bar.set_postfix(postfix, refresh=False)
                    # The end of an epoch is saved after its validation.
                    if at.position < per_epoch:
                        self._save_if_due(folder, at, fingerprint)
                epoch = {
                    "epoch": at.epoch,
                    "step": at.step,
                    "learning_rate": self._optimizers["generator"].param_groups[0]["lr"],
                    **{f"loss_{name}": value for name, value in at.means().items()},
                    **self._validate(val),
                    "seconds": round(time.monotonic() - began, 3),
                }
                better = self._judge(epoch, criterion, history)
                history.epochs.append(epoch)
                if better:
                    self._keep(folder)
                at.epoch, at.position, at.sums, at.counts = at.epoch + 1, 0, {}, {}
                if folder is not None:
                    folder.append_metrics(epoch)
                self._save_if_due(folder, at, fingerprint)
                if board is not None:
                    for name, value in epoch.items():
                        board.add_scalar(name, value, at.epoch)
                if self.progress:
                    bar.write(_line(epoch, better), file=sys.stderr)
        return True

    def _step(self, images: Tensor, step: int) -> dict[str, float]:
        """Run iteration `step` on `[B, 1, H, W]` images; returns the unweighted losses."""
        config, model = self.config, self.model
        # Before the forward pass: it would carry them into the running statistics of every normalisation.
        if not images.isfinite().all():
            raise NonFiniteError(f"step {step}: the images hold NaN or infinite pixels; nothing was updated with them")
        self._seed(_seed(config.seed, 2, step))
        images = augment(images, translate=config.translate, scale=config.scale)
        images = images.contiguous(memory_format=torch.channels_last)
        with_generator = step % config.generator_every == 0
        autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")

        with autocast, torch.set_grad_enabled(with_generator):
            found = model(images, teacher=with_generator and model.teacher is not None)
        terms = {}
        with autocast:
            if with_generator:
                terms["student"] = reconstruction_loss(images, found.student)
                if found.teacher is not None:
                    terms["teacher"] = reconstruction_loss(images, found.teacher)
                    terms["distillation"] = found.distillation
            losses = {
                "real": adversarial_loss(model.discriminator(images), real=True),
                "fake": adversarial_loss(model.discriminator(found.student.detach()), real=False),
            }
            total = config.discriminator_weight * (losses["real"] + losses["fake"])
        # The generator's terms too: otherwise the discriminator would be updated before a bad one stops the training.
        _require_finite({**terms, **losses}, step)
        self._update("discriminator", total, step)

        if with_generator:
            # Frozen, so that the generator's backward pass computes no gradients of its weights.
            model.discriminator.requires_grad_(False)
            try:
                with autocast:
                    terms["generator"] = adversarial_loss(model.discriminator(found.student), real=True)
                weighted = [getattr(config, f"{name}_weight") * term for name, term in terms.items()]
                _require_finite(terms, step)
                self._update("generator", torch.stack(weighted).sum(), step)
            finally:
                model.discriminator.requires_grad_(True)
            losses |= terms
            if model.queue is not None:
                model.queue.push(found.query)
        return {name: loss.item() for name, loss in losses.items()}

    def _update(self, side: str, total: Tensor, step: int) -> None:
        """Apply one optimiser step, unless the weighted loss or a gradient is not finite."""
        _require_finite({f"weighted {side}": total}, step)
        optimizer = self._optimizers[side]
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        parameters = [p for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        if not math.isfinite(torch.nn.utils.get_total_norm([p.grad for p in parameters]).item()):
            for parameter in parameters:
                if not parameter.grad.isfinite().all():
                    name = self._names[parameter]
                    raise NonFiniteError(
                        f"step {step}: the gradient of {name} is not finite; nothing was updated with it"
                    )
        optimizer.step()

    def _validate(self, val: ImageSet | None) -> dict[str, float]:
        """Return reconstruction error of normal validation images, and each signal's AUC where there are anomalies."""
        if val is None:
            return {}
        # Signals that are not finite are left out: there is no number to compare, and JSON has none to write.
        found = self.model.signals(val.batches())
        found = {name: values for name, values in found.items() if np.isfinite(values).all()}
        abnormal, result = val.labels == 1, {}
        if "residual" in found and not abnormal.all():
            result["val_reconstruction"] = float(found["residual"][~abnormal].mean())
        if abnormal.any() and not abnormal.all():
            for name, values in found.items():
                result[f"val_auc_{name}"] = metrics.auc(abnormal.astype(int), values).value
        return result

    def _criterion(self, train: ImageSet, val: ImageSet | None) -> str:
        """Check the images and return the criterion that chooses the epoch."""
        size = self.model.config.image_size
        for name, images in (("train", train), ("val", val)):
            if images is not None and tuple(images.pixels.shape[2:]) != (size, size):
                got = " x ".join(map(str, images.pixels.shape[2:]))
                raise ValueError(f"{name} images must be {size} x {size} pixels, as the model's, got {got}")
        if len(train) < 2:
            raise ValueError(f"training needs at least 2 images, got {len(train)}")
        abnormal = val.labels == 1 if val is not None else np.zeros(0, bool)
        both, normal = bool(abnormal.any() and not abnormal.all()), bool((~abnormal).any())
        criterion = self.config.criterion
        if criterion == "auto":
            return "auc" if both else "reconstruction" if normal else "last"
        if criterion == "auc" and not both:
            raise ValueError(
                f'criterion "auc" needs normal and abnormal validation images, '
                f"got {int((~abnormal).sum())} normal and {int(abnormal.sum())} abnormal"
            )
        if criterion == "reconstruction" and not normal:
            raise ValueError('criterion "reconstruction" needs normal validation images, got none')
        return criterion

    def _judge(self, epoch: dict[str, object], criterion: str, history: History) -> bool:
        """Return whether this epoch is the best so far, and note it; one without a value is kept for want of others."""
        if criterion == "last":
            value = float(epoch["epoch"])
        elif criterion == "auc":
            value = epoch.get(f"val_auc_{self.model.signal}")
        else:
            value = -epoch["val_reconstruction"] if "val_reconstruction" in epoch else None
        if value is None:
            better = history.best_epoch is None
        else:
            better = history.best_value is None or value > history.best_value
        if better:
            history.best_epoch, history.best_value = epoch["epoch"], value
        return better

    def _patience_over(self, at: _Progress) -> bool:
        best = at.history.best_epoch
        return bool(self.config.patience) and best is not None and at.epoch - 1 - best >= self.config.patience

    def _set_learning_rate(self, epoch: int) -> None:
        """Set the cosine schedule's value; the last epoch comes close to the final rate."""
        config = self.config
        cosine = (1 + math.cos(math.pi * epoch / config.epochs)) / 2
        rate = config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine
        for optimizer in self._optimizers.values():
            optimizer.param_groups[0]["lr"] = rate

    def _calibrate(
        self, train: ImageSet, val: ImageSet | None, folder: RunFolder | None, at: _Progress, fingerprint: str
    ) -> None:
        held = np.flatnonzero(val.labels != 1) if val is not None else []
        holdout = val.select(held).batches() if len(held) else None
        self.model.calibrate(train.batches(), holdout)
        if folder is not None:
            self.model.save(folder.path)
            self._save_state(folder, at, fingerprint)

    def _keep(self, folder: RunFolder | None) -> None:
        if folder is not None:
            self.model.save(folder.path)
        else:
            self._best = copy.deepcopy(self.model.state_dict())

    def _load_best(self, folder: RunFolder | None) -> None:
        if folder is not None:
            best = Model.load(folder.path)
            self.model.load_state_dict(best.state_dict())
            self.model.calibration = best.calibration
        elif self._best is not None:
            self.model.load_state_dict(self._best)
        self.model.eval()

    def _save_if_due(self, folder: RunFolder | None, at: _Progress, fingerprint: str) -> None:
        if folder is not None and time.monotonic() - self._saved >= self.config.checkpoint_seconds:
            self._save_state(folder, at, fingerprint)
            self._saved = time.monotonic()

    def _save_state(self, folder: RunFolder, at: _Progress, fingerprint: str) -> None:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for side, optimizer in self._optimizers.items():
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    tensors[f"optimizer.{side}.{key}.{self._names[parameter]}"] = value
        document = {
            "progress": dataclasses.asdict(at),
            "data": fingerprint,
            "config": self.model.config.to_dict(),
            "training": self.config.to_dict(),
        }
        folder.write_state(tensors, document)

    def _restore(self, folder: RunFolder, fingerprint: str) -> _Progress:
        tensors, document = folder.read_state()
        asked = {"config": self.model.config.to_dict(), "training": self.config.to_dict(), "data": fingerprint}
        for name, value in asked.items():
            if document.get(name) != value:
                what = {"config": "another model configuration", "training": "another training configuration"}
                raise RunError(
                    f"{folder.path} was started with {what.get(name, 'other images')}; "
                    f"resume it with the same, or start anew"
                )
        source = f"{folder.path}/last.json"
        own = {name[6:]: value for name, value in tensors.items() if name.startswith("model.")}
        checkpoint.load_state(self.model, own, source)
        for side, optimizer in self._optimizers.items():
            prefix = f"optimizer.{side}."
            for parameter in optimizer.param_groups[0]["params"]:
                state = {}
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    value = tensors.get(f"{prefix}{key}.{self._names[parameter]}")
                    if value is None:
                        break
                    # The layout of the weights: another one takes another path through the arithmetic.
                    state[key] = (
                        value.to(parameter.device) if key == "step" else torch.empty_like(parameter).copy_(value)
                    )
                else:
                    optimizer.state[parameter] = state
        try:
            progress = dict(document["progress"])
            progress["history"] = History(**progress["history"])
            return _Progress(**progress)
        except (KeyError, TypeError) as error:
            raise checkpoint.CheckpointError(f"{source} is not a training state: {error}") from None

    def _fresh_optimizers(self) -> dict[str, torch.optim.Adam]:
        config, sides = self.config, {"generator": [], "discriminator": []}
        for name, parameter in self.model.named_parameters():
            sides["discriminator" if name.startswith("discriminator.") else "generator"].append(parameter)
        adam = {"lr": config.learning_rate, "betas": (0.5, 0.999), "fused": True}
        return {
            "generator": torch.optim.Adam(
                sides["generator"], eps=1e-7, weight_decay=config.generator_weight_decay, **adam
            ),
            "discriminator": torch.optim.Adam(sides["discriminator"], eps=1e-8, **adam),
        }

    def _seed(self, seed: int) -> None:
        """Seed the CPU's generator and the model's device's; `torch.manual_seed` would touch every other GPU's too."""
        torch.default_generator.manual_seed(seed)
        for index in self._cuda_devices():
            torch.cuda.default_generators[index].manual_seed(seed)

    def _cuda_devices(self) -> list[int]:
        return [self.model.device.index or 0] if self.model.device.type == "cuda" else []

    @contextmanager
    def _graceful_interrupt(self) -> Iterator[None]:
        """Let the first Ctrl-C finish the iteration and write the state; the second one stops at once."""
        self._interrupted = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: object) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        previous = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    @contextmanager
    def _writer(self, folder: RunFolder | None, at: _Progress) -> Iterator[object | None]:
        if not self.config.tensorboard:
            yield None
            return
        # What a killed process showed beyond its state goes.
        with _summary_writer()(str(folder.path / "tensorboard"), purge_step=at.epoch + 1) as writer:
            yield writer


class _TensorSet:
    """Images `[n, 1, H, W]` in -1..1, all normal, in the form that training reads."""

    def __init__(self, images: Tensor) -> None:
        if images.dim() != 4 or images.shape[1] != 1 or not images.is_floating_point():
            raise ValueError(f"images must be float [n, 1, H, W], got {images.dtype} {list(images.shape)}")
        self.pixels = images
        self.labels = np.zeros(len(images), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, index: Tensor | slice, device: torch.device | str = "cpu") -> Tensor:
        return self.pixels[index].to(device, torch.float32)

    def batches(self, size: int = 256) -> Iterator[Tensor]:
        yield from self.pixels.float().split(size)

    def select(self, index: np.ndarray) -> "_TensorSet":
        return _TensorSet(self.pixels[torch.as_tensor(index)])


def _as_images(images: ImageSet | Tensor) -> ImageSet | _TensorSet:
    return _TensorSet(images) if isinstance(images, Tensor) else images


def _summary_writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RunError("tensorboard=True needs TensorBoard: pip install 'simsid[tensorboard]'") from None
    return SummaryWriter


def _require_finite(losses: dict[str, Tensor], step: int) -> None:
    for name, loss in losses.items():
        if not math.isfinite(loss.item()):
            raise NonFiniteError(f"step {step}: the {name} loss is {loss.item()}; nothing was updated with it")


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def _fingerprint(train: ImageSet, val: ImageSet | None) -> str:
    """Return a hash of all pixels and labels, by which a resumed run knows its images."""
    digest = hashlib.sha256()
    for images in (train, val):
        if images is not None:
            digest.update(images.pixels.cpu().contiguous().numpy())
            digest.update(images.labels.tobytes())
    return digest.hexdigest()


def _line(epoch: dict[str, object], better: bool) -> str:
    """Return an epoch's result for the terminal."""
    shown = [f"epoch {epoch['epoch'] + 1:>3}"]
    # An epoch of one iteration may have updated the discriminator alone.
    shown += [f"student {epoch['loss_student']:.5f}"] if "loss_student" in epoch else []
    if "val_reconstruction" in epoch:
        shown.append(f"val {epoch['val_reconstruction']:.5f}")
    shown += [f"{name[8:]} {value:.3f}" for name, value in epoch.items() if name.startswith("val_auc_")]
    return "  ".join(shown) + ("  *" if better else "")

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
from simsid.config import Config, TrainingConfig
from simsid.data import ImageSet
from simsid.distributed import ProcessGroup
from simsid.errors import CheckpointError, NonFiniteError, RunError
from simsid.kernels.ranges import stage
from simsid.models.model import Model
from simsid.models.signals import Calibration
from simsid.training.parallel import synchronize_batch_norms
from simsid.training.run_folder import RunFolder
from simsid.training.step import TrainingStep

AGREED_EVERY = 8
"""Iterations on GPUs after which a group asks whether anyone pressed Ctrl-C."""

REQUEST = {
    "config": "another model configuration",
    "training": "another training configuration",
    "data": "other images",
}
"""What a run is known by: a state of another one is not gone on from, and processes that differ do not train."""

SHOWN_SECONDS = 0.5
"""Between two looks at the losses for the progress bar; each waits for the device."""


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
    """Of each loss over this epoch's iterations; the step has them until the state is saved."""
    counts: dict[str, int] = field(default_factory=dict)
    history: History = field(default_factory=History)
    finished: bool = False


class Trainer:
    """Trains a model: cosine schedule, validation, checkpoints, early stopping; `TrainingStep` is one iteration.

    The order of the images comes from `config.seed` and the epoch, all that an iteration draws from its number, so that
    a resumed run repeats an uninterrupted one. Source: SimSID, section 3.5 and 4.2.

    Args:
        model: trained in place, on the device it is on.
        config: a `TrainingConfig`; None is the papers'.
        run: a folder for metrics and checkpoints, or None to keep everything in memory.
        progress: show a progress bar.
        group: the processes that train together; every one of them calls `fit` with the same images. Rank 0 alone reads
            and writes the run folder.

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
        group: ProcessGroup | None = None,
    ) -> None:
        self.model = model
        self.group = group or ProcessGroup()
        self.config = config = config or TrainingConfig()
        self.run = run
        self.progress = progress and self.group.main
        self._step: TrainingStep | None = None
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
            RunError: the run folder is in use, already holds a run or a model, or holds another run; members of a group
                that were given different images or configurations.
        """
        train, val = _as_images(train), _as_images(val) if val is not None and len(val) else None
        criterion = self._criterion(train, val)
        # Before anything is written.
        self._batch_size(train)
        if self.run is None:
            if resume:
                raise RunError("resume=True needs the run folder to resume")
            return self._fit(train, val, criterion, None, resume=False)
        if not self.group.main:
            return self._fit(train, val, criterion, None, resume=resume)
        held = nullcontext(self.run) if isinstance(self.run, RunFolder) else RunFolder(self.run)
        with held as folder:
            return self._fit(train, val, criterion, folder, resume=resume)

    def _fit(
        self, train: ImageSet, val: ImageSet | None, criterion: str, folder: RunFolder | None, *, resume: bool
    ) -> History:
        fingerprint = _fingerprint(train, val)
        if folder is not None and not resume and folder.taken:
            raise RunError(f"{folder.path} already holds a run or a model; resume it or choose another folder")
        self._check_agreement(fingerprint)
        train, val = _on_device(train, self.model.device), _on_device(val, self.model.device)
        # Optimisers without a past.
        self._step, self._best = TrainingStep(self.model, self.config, self.group), None
        # What normal films look like to other weights; none of the epochs kept on the way may carry it.
        self.model.calibration = None
        at = self._restored(folder, fingerprint) if resume else _Progress()
        for name, buffer in self.model.named_buffers():
            if not buffer.isfinite().all():
                raise NonFiniteError(f"the model's {name} is not finite, as a training that stops so leaves it")
        if folder is not None:
            folder.write_metrics(at.history.epochs)
        if at.finished:
            self._load_best(folder)
            return at.history
        with (
            self._graceful_interrupt(),
            torch.random.fork_rng(devices=[self.model.device] if self.model.device.type == "cuda" else []),
            self._writer(folder, at) as board,
        ):
            if self._epochs(train, val, criterion, folder, at, fingerprint, board):
                self._load_best(folder)
                at.finished = True
                self._calibrate(train, val, folder, at, fingerprint)
        # Synchronised or not is this training's affair.
        synchronize_batch_norms(self.model, False)
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
        config, history, step = self.config, at.history, self._step
        size = self._batch_size(train)
        per_epoch = len(train) // size
        self._saved = shown = time.monotonic()
        step.reset(at.sums, at.counts)
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
                rate = self._learning_rate(at.epoch)
                step.set_learning_rate(rate)
                order = np.random.default_rng([config.seed, 1, at.epoch]).permutation(len(train))
                order = torch.from_numpy(order).to(train.pixels.device)
                self.model.train()
                while at.position < per_epoch:
                    if self._should_stop(at):
                        if folder is not None:
                            self._save_state(folder, at, fingerprint)
                        history.interrupted = True
                        return False
                    with stage("data"):
                        index = self.group.shard(order[at.position * size : (at.position + 1) * size])
                        images = train.batch(index, self.model.device)
                    step(images, at.step)
                    at.position, at.step = at.position + 1, at.step + 1
                    bar.update()
                    # Reading the losses waits for the device.
                    if self.progress and time.monotonic() - shown >= SHOWN_SECONDS:
                        bar.set_description(f"epoch {at.epoch + 1}/{config.epochs}", refresh=False)
                        bar.set_postfix({name: f"{value:.4f}" for name, value in step.means().items()}, refresh=False)
                        shown = time.monotonic()
                    # The end of an epoch is saved after its validation.
                    if at.position < per_epoch:
                        self._save_if_due(folder, at, fingerprint)
                epoch = {
                    "epoch": at.epoch,
                    "step": at.step,
                    "learning_rate": rate,
                    **{f"loss_{name}": value for name, value in step.means().items()},
                    **self._validate(val),
                    "seconds": round(time.monotonic() - began, 3),
                }
                better = self._judge(epoch, criterion, history)
                history.epochs.append(epoch)
                if better:
                    self._keep(folder)
                at.epoch, at.position = at.epoch + 1, 0
                step.reset()
                if folder is not None:
                    folder.append_metrics(epoch)
                self._save_if_due(folder, at, fingerprint)
                if board is not None:
                    for name, value in epoch.items():
                        board.add_scalar(name, value, at.epoch)
                if self.progress:
                    bar.write(_line(epoch, better), file=sys.stderr)
        return True

    def _validate(self, val: ImageSet | None) -> dict[str, float]:
        """Return reconstruction error of normal validation images, and each signal's AUC where there are anomalies."""
        if val is None:
            return {}
        self.group.broadcast_tensors(self.model.buffers())
        # Signals that are not finite are left out: there is no number to compare, and JSON has none to write.
        found = self._signals(val)
        found = {name: values for name, values in found.items() if np.isfinite(values).all()}
        abnormal, result = val.labels == 1, {}
        if "residual" in found and not abnormal.all():
            result["val_reconstruction"] = float(found["residual"][~abnormal].mean())
        if abnormal.any() and not abnormal.all():
            for name, values in found.items():
                result[f"val_auc_{name}"] = metrics.auc(abnormal.astype(int), values).value
        return result

    def _signals(self, images: ImageSet) -> dict[str, np.ndarray]:
        """Return the signals of all images, each measured by one member of the group."""
        if self.group.size == 1:
            return self.model.signals(images.batches())
        own = range(self.group.rank, len(images), self.group.size)
        where = images.pixels.device
        parts = (images.batch(own[start : start + 256], where) for start in range(0, len(own), 256))
        return self.group.interleave(self.model.signals(parts), len(images))

    def _batch_size(self, train: ImageSet) -> int:
        """Return the images of an iteration, which divide among the group."""
        size, group = self.config.batch_size, self.group.size
        if size % group or len(train) < group:
            raise ValueError(
                f"the batch size must be a multiple of the {group} processes, with an image for each, "
                f"got batch_size={size} and {len(train)} images"
            )
        return min(size, len(train) // group * group)

    def _should_stop(self, at: _Progress) -> bool:
        """Return whether Ctrl-C was pressed; a group agrees, and on GPUs not at every iteration."""
        if self.model.device.type == "cuda" and at.step % AGREED_EVERY and self.group.size > 1:
            return False
        return self.group.any(self._interrupted)

    def _criterion(self, train: ImageSet, val: ImageSet | None) -> str:
        """Check the images and return the criterion that chooses the epoch."""
        size = self.model.config.image_size
        for name, images in (("train", train), ("val", val)):
            if images is not None and tuple(images.pixels.shape[2:]) != (size, size):
                got = " x ".join(map(str, images.pixels.shape[2:]))
                raise ValueError(f"{name} images must be {size} x {size} pixels, as the model's, got {got}")
        if len(train) < 2:
            raise ValueError(f"training needs at least 2 images, got {len(train)}")
        # Once, not in every iteration, where it would wait for the device. Integers are always finite.
        if train.pixels.is_floating_point() and not train.pixels.isfinite().all():
            raise NonFiniteError("the train images hold NaN or infinite pixels; nothing was trained")
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

    def _learning_rate(self, epoch: int) -> float:
        """Return the cosine schedule's value; the last epoch comes close to the final rate."""
        config = self.config
        cosine = (1 + math.cos(math.pi * epoch / config.epochs)) / 2
        return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine

    def _calibrate(
        self, train: ImageSet, val: ImageSet | None, folder: RunFolder | None, at: _Progress, fingerprint: str
    ) -> None:
        held = np.flatnonzero(val.labels != 1) if val is not None else []
        holdout = self._signals(val.select(held)) if len(held) else None
        self.model.calibration = Calibration.fit(self._signals(train), holdout)
        if folder is not None:
            self.model.save(folder.path)
            self._save_state(folder, at, fingerprint)

    def _keep(self, folder: RunFolder | None) -> None:
        if folder is not None:
            self.model.save(folder.path)
        elif self.group.main:
            self._best = copy.deepcopy(self.model.state_dict())

    def _load_best(self, folder: RunFolder | None) -> None:
        if folder is not None:
            best = Model.load(folder.path)
            self.model.load_state_dict(best.state_dict())
            self.model.calibration = best.calibration
        elif self._best is not None:
            self.model.load_state_dict(self._best)
        self.group.broadcast_tensors([*self.model.buffers(), *self.model.parameters()])
        self.model.calibration = self.group.broadcast(lambda: self.model.calibration)
        self.model.eval()

    def _save_if_due(self, folder: RunFolder | None, at: _Progress, fingerprint: str) -> None:
        if folder is not None and time.monotonic() - self._saved >= self.config.checkpoint_seconds:
            self._save_state(folder, at, fingerprint)
            self._saved = time.monotonic()

    def _save_state(self, folder: RunFolder, at: _Progress, fingerprint: str) -> None:
        # First of all it raises what was not finite.
        at.sums, at.counts = self._step.sums(), dict(self._step.counts)
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for side, optimizer in self._step.optimizers.items():
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    tensors[f"optimizer.{side}.{key}.{names[parameter]}"] = value
        folder.write_state(tensors, {"progress": dataclasses.asdict(at), **self._request(fingerprint)})

    def _request(self, fingerprint: str) -> dict[str, object]:
        """Return what a run is known by."""
        return {"config": self.model.config.to_dict(), "training": self.config.to_dict(), "data": fingerprint}

    def _check_agreement(self, fingerprint: str) -> None:
        """Refuse to train on what is not the same at every member."""
        requests = self.group.all_gather_object(self._request(fingerprint))
        for rank, request in enumerate(requests):
            for name, value in request.items():
                if value != requests[0][name]:
                    raise RunError(f"the processes must train on the same; rank {rank} has {REQUEST[name]} than rank 0")

    def _read_state(self, folder: RunFolder, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, object]] | None:
        """Read the run folder's state, if there is one, and refuse another run's."""
        if not folder.started:
            return None
        tensors, document = checkpoint.read(folder.path, "last")
        # Settings that an older version did not have were at their defaults.
        for name, defaults in (("config", Config()), ("training", TrainingConfig())):
            document[name] = {**defaults.to_dict(), **document.get(name, {})}
        for name, value in self._request(fingerprint).items():
            if document.get(name) != value:
                raise RunError(
                    f"{folder.path} was started with {REQUEST[name]}; resume it with the same, or start anew"
                )
        return tensors, document

    def _restored(self, folder: RunFolder | None, fingerprint: str) -> _Progress:
        """Load weights and optimisers from the run folder's state, if there is one, and return where training stood."""
        # From rank 0, before it writes; the others need not see the folder.
        state = self.group.broadcast(lambda: self._read_state(folder, fingerprint))
        if state is None:
            return _Progress()
        tensors, document = state
        source = f"{self.run.path if isinstance(self.run, RunFolder) else self.run}/last.json"
        own = {name[6:]: value for name, value in tensors.items() if name.startswith("model.")}
        checkpoint.load_state(self.model, own, source)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for side, optimizer in self._step.optimizers.items():
            prefix = f"optimizer.{side}."
            for parameter in optimizer.param_groups[0]["params"]:
                state = {}
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    value = tensors.get(f"{prefix}{key}.{names[parameter]}")
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
            raise CheckpointError(f"{source} is not a training state: {error}") from None

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
        if not self.config.tensorboard or not self.group.main:
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

    def to(self, device: torch.device) -> "_TensorSet":
        return _TensorSet(self.pixels.to(device))


def _as_images(images: ImageSet | Tensor) -> ImageSet | _TensorSet:
    return _TensorSet(images) if isinstance(images, Tensor) else images


def _on_device(images: ImageSet | _TensorSet | None, device: torch.device) -> ImageSet | _TensorSet | None:
    """Keep images where they are trained on, if they take no more than a quarter of the memory that is free there."""
    if images is None or device.type != "cuda":
        return images
    pixels = images.pixels
    free, _ = torch.cuda.mem_get_info(device)
    return images.to(device) if pixels.numel() * pixels.element_size() <= free // 4 else images


def _summary_writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RunError("tensorboard=True needs TensorBoard: pip install 'simsid[tensorboard]'") from None
    return SummaryWriter


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

"""The epoch loop: schedule, validation, checkpoints, early stopping, and a graceful Ctrl-C."""

import math
import os
import sys
import time
from collections.abc import Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from simsid import checkpoint
from simsid.arguments import require_instance
from simsid.config import TrainingConfig
from simsid.data import ImageSet
from simsid.distributed import ProcessGroup
from simsid.errors import RunError
from simsid.kernels.ranges import stage
from simsid.models.base import warn_of_abnormal
from simsid.models.model import Model
from simsid.training import state
from simsid.training.criterion import choose_best, choose_criterion, is_out_of_patience
from simsid.training.guard import check_finite
from simsid.training.interrupt import GracefulInterrupt
from simsid.training.parallel import synchronize_batch_norms
from simsid.training.run_folder import RunFolder
from simsid.training.state import History, Progress
from simsid.training.step import TrainingStep, with_chosen_precision
from simsid.training.validation import (
    calibrate,
    choose_batch_size,
    measure_items,
    paste_patches,
    to_image_set,
    validate,
    validate_images,
)

ORDER_STREAM = 1
"""Keeps the order of the images apart from what an iteration draws, which uses the stream 2 of the same seed."""

SHOW_SECONDS = 0.5
"""Time between two updates of the losses in the progress bar; reading them waits for the device."""


@dataclass
class _Training:
    """What one call of `Trainer.fit` works on."""

    train: ImageSet
    val: ImageSet | None
    criterion: str
    batch_size: int
    folder: RunFolder | None
    request: state.Request
    step: TrainingStep
    progress: Progress
    pasted: ImageSet | None = None
    """Synthetic anomalies, where the criterion needs them."""
    board: Any = None
    """TensorBoard's writer, or None."""

    @property
    def iterations(self) -> int:
        """Iterations of an epoch."""
        return len(self.train) // self.batch_size


class Trainer:
    """Trains a model: cosine schedule, validation, checkpoints, early stopping; `TrainingStep` is one iteration.

    The order of the images depends on `config.seed` and the epoch only, and the random numbers of an iteration on the
    seed and its number only, so a resumed run repeats an uninterrupted one. Source: SimSID, sections 3.5 and 4.2.

    Args:
        model: trained in place, on its device.
        config: a `TrainingConfig`; None is the papers'.
        run: a folder for metrics and checkpoints, or None to keep everything in memory.
        progress: show a progress bar.
        group: the ranks that train together; every one of them calls `fit` with the same images. Only rank 0 reads and
            writes the run folder.

    Raises:
        InputTypeError: an argument of another type.
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
        config = TrainingConfig() if config is None else config
        self.group = ProcessGroup() if group is None else group
        require_instance("model", model, Model)
        require_instance("config", config, TrainingConfig)
        require_instance("group", self.group, ProcessGroup)
        require_instance("run", run, RunFolder, str, os.PathLike, type(None))
        self.model = model
        # A run keeps its precision, wherever it is resumed.
        self.config = with_chosen_precision(config, model)
        self.run = run
        self.progress = progress and self.group.main
        self._best: dict[str, Tensor] | None = None
        self._saved = self._shown = 0.0
        if config.tensorboard:
            # Fail now rather than after loading the data set.
            if run is None:
                raise RunError("tensorboard=True needs a run folder to write into")
            _summary_writer()

    def fit(self, train: object, val: object = None, *, resume: bool = False) -> History:
        """Train on `train`, keep the best epoch by the criterion on `val`, calibrate, and return the history.

        All images of `train` are trained on: pass normal ones. The model ends with the best epoch's weights, in
        inference mode, calibrated on `train` (un-augmented), with the normal images of `val` held out for thresholds.
        After Ctrl-C the state is written, the model keeps the weights of the moment, and `History.interrupted` is set.

        Args:
            train: at least 2 images: an `ImageSet`, a float tensor or array `[n, 1, H, W]` in -1..1, a torch `Dataset`,
                a `DataLoader`, or whatever else `simsid.data.as_image_set` takes. They are read into memory.
            val: images to validate on, likewise; label 1 is abnormal, and images without labels are taken as normal.
                None validates nothing.
            resume: resume from the run folder's state, or begin where the run was stopped before it wrote one; the
                images and the configuration must be the same.

        Raises:
            InputError: images that do not fit the model, or a criterion that `val` cannot give.
            InputTypeError: objects that hold no images.
            NonFiniteError: images, a loss, a gradient or a statistic are not finite; the last checkpoint is intact.
            DeviceMemoryError: the GPU has too little memory for a batch.
            RunError: the run folder is in use, cannot be written, already holds a run or a model, or holds another
                run; or ranks that have different images or configurations.
        """
        images = to_image_set(train, "train", self.model.config)
        warn_of_abnormal(images)
        is_empty = val is None or (isinstance(val, Sized) and len(val) == 0)
        val_images = None if is_empty else to_image_set(val, "val", self.model.config)
        validate_images(images, val_images, self.model.config.image_size)
        criterion = choose_criterion(self.config, val_images, self.model.signal_names)
        batch_size = choose_batch_size(self.config.batch_size, self.group, len(images))
        if resume and self.run is None:
            raise RunError("resume=True needs the run folder to resume")
        with self._run_folder() as folder:
            if folder is not None and not resume and folder.taken:
                raise RunError(f"{folder.path} already holds a run or a model; resume it or choose another folder")
            request = state.make_request(self.model, self.config, images, val_images)
            state.check_agreement(self.group, request)
            images = _on_device(images, self.model.device)
            val_images = _on_device(val_images, self.model.device) if val_images is not None else None
            # A new step: its optimizers start without moments.
            step = TrainingStep(self.model, self.config, self.group)
            training = _Training(images, val_images, criterion, batch_size, folder, request, step, Progress())
            if criterion == "synthetic" and val_images is not None:
                training.pasted = paste_patches(val_images.select(val_images.labels != 1))
            self._best = None
            # Until it is measured again: a calibration of other weights must not be saved with an epoch.
            self.model.calibration = None
            if resume:
                training.progress = self._restore(training)
            check_finite(dict(self.model.named_buffers()), "the model's")
            return self._fit(training)

    def _fit(self, training: _Training) -> History:
        progress, folder = training.progress, training.folder
        if folder is not None:
            folder.write_metrics(progress.history.epochs)
        if progress.finished:
            self._load_best(folder)
            return progress.history
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        interrupt = GracefulInterrupt(self.group, on_gpu=bool(devices))
        with interrupt, torch.random.fork_rng(devices=devices), _tensorboard(training, self.config.tensorboard):
            if self._epochs(training, interrupt):
                self._load_best(folder)
                progress.finished = True
                calibrate(self.model, self.group, training.train, training.val)
                if folder is not None:
                    self._save_model(folder)
                self._save(training)
        synchronize_batch_norms(self.model, False)
        self.model.eval()
        return progress.history

    def _epochs(self, training: _Training, interrupt: GracefulInterrupt) -> bool:
        """Run the remaining epochs; False when interrupted."""
        config, progress = self.config, training.progress
        self._saved = self._shown = time.monotonic()
        training.step.reset(progress.sums, progress.counts)
        with tqdm(
            total=config.epochs * training.iterations,
            initial=progress.step,
            disable=not self.progress,
            unit="it",
            smoothing=0.05,
            # Each refresh is a line of its own in a log file.
            mininterval=0.1 if sys.stderr.isatty() else 60,
        ) as bar:
            while progress.epoch < config.epochs and not is_out_of_patience(progress.history, config):
                began = time.monotonic()
                if not self._iterations(training, interrupt, bar):
                    progress.history.interrupted = True
                    return False
                epoch, better = self._finish_epoch(training, began)
                if training.board is not None:
                    for name, value in epoch.items():
                        training.board.add_scalar(name, value, progress.epoch)
                if self.progress:
                    bar.write(_epoch_line(epoch, better), file=sys.stderr)
        return True

    def _iterations(self, training: _Training, interrupt: GracefulInterrupt, bar: tqdm) -> bool:
        """Run the remaining iterations of an epoch; False when interrupted, with the state saved."""
        config, progress, step, size = self.config, training.progress, training.step, training.batch_size
        step.set_learning_rate(learning_rate(config, progress.epoch))
        images = training.train
        permutation = np.random.default_rng([config.seed, ORDER_STREAM, progress.epoch]).permutation(len(images))
        order = torch.from_numpy(permutation).to(images.pixels.device)
        self.model.train()
        while progress.position < training.iterations:
            if interrupt.should_stop(progress.step):
                self._save(training)
                return False
            with stage("data"):
                start = progress.position * size
                batch = images.batch(self.group.shard(order[start : start + size]), self.model.device)
            step(batch, progress.step)
            progress.position, progress.step = progress.position + 1, progress.step + 1
            bar.update()
            if self.progress and time.monotonic() - self._shown >= SHOW_SECONDS:
                bar.set_description(f"epoch {progress.epoch + 1}/{config.epochs}", refresh=False)
                bar.set_postfix({name: f"{value:.4f}" for name, value in step.means().items()}, refresh=False)
                self._shown = time.monotonic()
            # The end of an epoch is saved after its validation.
            if progress.position < training.iterations:
                self._save_if_due(training)
        return True

    def _finish_epoch(self, training: _Training, began: float) -> tuple[dict[str, float], bool]:
        """Validate, keep the weights if they are the best, and save; returns the epoch's metrics and whether it is."""
        progress = training.progress
        losses = {f"loss_{name}": value for name, value in training.step.means().items()}
        # An infinite running variance leaves every loss finite and shows only in validation and scoring.
        check_finite(checkpoint.tensors(self.model), "the model's")
        epoch: dict[str, float] = {
            "epoch": progress.epoch,
            "step": progress.step,
            "learning_rate": learning_rate(self.config, progress.epoch),
            **losses,
            **validate(self.model, self.group, training.val, training.pasted, training.train),
            **measure_items(self.model),
            "seconds": round(time.monotonic() - began, 3),
        }
        better = choose_best(progress.history, epoch, training.criterion, self.model.signal)
        progress.history.epochs.append(epoch)
        if better:
            self._keep(training.folder)
        progress.epoch, progress.position = progress.epoch + 1, 0
        training.step.reset()
        if training.folder is not None:
            training.folder.append_metrics(epoch)
        self._save_if_due(training)
        return epoch, better

    def _keep(self, folder: RunFolder | None) -> None:
        """Keep the model as the best so far."""
        if folder is not None:
            self._save_model(folder)
        elif self.group.main:
            self._best = {name: value.clone() for name, value in checkpoint.tensors(self.model).items()}

    def _load_best(self, folder: RunFolder | None) -> None:
        """Load the best model, on every rank."""
        own = checkpoint.tensors(self.model)
        if folder is not None:
            best = Model.load(folder.path, **self.model.load_options())
            self._best, self.model.calibration = checkpoint.tensors(best), best.calibration
        if self._best is not None:
            with torch.no_grad():
                for name, value in self._best.items():
                    own[name].copy_(value)
        self._best = None
        self.group.broadcast_tensors(own.values())
        self.model.calibration = self.group.broadcast(lambda: self.model.calibration)
        self.model.eval()

    def _save_model(self, folder: RunFolder) -> None:
        with folder.writing("model.json"):
            self.model.save(folder.path)

    def _save_if_due(self, training: _Training) -> None:
        if training.folder is not None and time.monotonic() - self._saved >= self.config.checkpoint_seconds:
            self._save(training)

    def _save(self, training: _Training) -> None:
        if training.folder is not None:
            state.save(training.folder, training.step, training.progress, training.request)
            self._saved = time.monotonic()

    def _restore(self, training: _Training) -> Progress:
        """Load the run folder's state, if it has one, on every rank; the other ranks need not see the folder."""
        folder = training.folder

        def read() -> state.SavedState | None:
            return state.read(folder, training.request) if folder is not None else None

        saved = self.group.broadcast(read)
        if saved is None:
            return Progress()
        path = self.run.path if isinstance(self.run, RunFolder) else self.run
        return state.restore(saved, training.step, f"{path}/last.json")

    def _run_folder(self) -> "AbstractContextManager[RunFolder | None]":
        """Return the run folder, opened where it was given as a path; None on the ranks that do not write."""
        if self.run is None or not self.group.main:
            return nullcontext(None)
        return nullcontext(self.run) if isinstance(self.run, RunFolder) else RunFolder(self.run)


def learning_rate(config: TrainingConfig, epoch: int) -> float:
    """Return the cosine schedule's rate in `epoch`; the last epoch is one step short of the final rate."""
    cosine = (1 + math.cos(math.pi * epoch / config.epochs)) / 2
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine


def _on_device(images: ImageSet, device: torch.device) -> ImageSet:
    """Move images to a GPU if they take no more than a quarter of its free memory; else batches are copied."""
    if device.type != "cuda":
        return images
    pixels = images.pixels
    free, _ = torch.cuda.mem_get_info(device)
    return images.to(device) if pixels.numel() * pixels.element_size() <= free // 4 else images


@contextmanager
def _tensorboard(training: _Training, enabled: bool) -> Iterator[None]:
    """Write the training's metrics to TensorBoard while the block runs."""
    if not enabled or training.folder is None:
        yield
        return
    path = str(training.folder.path / "tensorboard")
    # A killed process may have shown epochs after its last state, which are repeated now.
    with _summary_writer()(path, purge_step=training.progress.epoch + 1) as training.board:
        yield


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RunError("tensorboard=True needs TensorBoard: pip install 'simsid[tensorboard]'") from None
    return SummaryWriter


def _epoch_line(epoch: dict[str, float], better: bool) -> str:
    """Return an epoch's result for the terminal; a star marks the best so far."""
    parts = [f"epoch {int(epoch['epoch']) + 1:>3}"]
    # An epoch of one iteration may have updated the discriminator alone.
    parts += [f"student {epoch['loss_student']:.5f}"] if "loss_student" in epoch else []
    if "val_reconstruction" in epoch:
        parts.append(f"val {epoch['val_reconstruction']:.5f}")
    parts += [f"{name[8:]} {value:.3f}" for name, value in epoch.items() if name.startswith("val_auc_")]
    return "  ".join(parts) + ("  *" if better else "")

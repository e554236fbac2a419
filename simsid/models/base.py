"""The interface that every anomaly model implements; scoring, evaluation, reports and commands know nothing else."""

import abc
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from simsid import checkpoint
from simsid.arguments import require_device, require_path, require_whole_number
from simsid.data import ImageSet, Preprocessing, as_batches
from simsid.distributed import ProcessGroup
from simsid.errors import CalibrationError, CheckpointError, InputError
from simsid.models.calibration import Calibration, LocationUnits, location_statistics, standardize_locations
from simsid.models.memory_contents import MemoryContents
from simsid.models.signals import MAPS, SIGNALS, check_signals, upsampled
from simsid.precision import check_precision

BATCH = 16
"""Images of a forward pass. Fewer are padded to it: libraries sum in another order for another batch size, which would
change the last digits of a score."""


@dataclass(frozen=True)
class Adaptation:
    """What `AnomalyModel.adapt` did.

    Args:
        added: images added to the memory.
        known: images that were in the memory already and were left out.
        fitted: images of the memory before any adaptation.
        abnormal: the added images that look abnormal among the others, most abnormal first: name (the file, or the
            index as text) and robust deviations of the combined signal above the median.
    """

    added: int
    known: int
    fitted: int
    abnormal: tuple[tuple[str, float], ...]


class Scorer(abc.ABC):
    """What computes signals, maps and scores: a model, or a frozen copy of one.

    `images` is `[B, 1, H, W]` in -1..1 (a floating-point tensor or array), or whatever `simsid.data.as_batches` takes:
    an `ImageSet`, a torch `Dataset`, a `DataLoader`, an iterable of such batches.
    """

    calibration: Calibration | None = None

    precision: str = "auto"
    """The arithmetic of signals asked for, one of `simsid.precision.PRECISIONS`; see `scoring_precision`."""

    @property
    def scoring_precision(self) -> str:
        """The arithmetic of signals, `"float32"` or `"bfloat16"`: the one asked for; for `"auto"` the calibration's."""
        if self.precision != "auto":
            return self.precision
        return self.calibration.precision if self.calibration is not None else "float32"

    @property
    @abc.abstractmethod
    def preprocessing(self) -> Preprocessing:
        """How files become the images this model takes."""

    @property
    @abc.abstractmethod
    def signal(self) -> str:
        """The name of the signal that `score` and thresholds use by default."""

    @property
    @abc.abstractmethod
    def signal_names(self) -> tuple[str, ...]:
        """The signals of this model, names of `simsid.models.signals.SIGNALS`."""

    @abc.abstractmethod
    def outputs(self, images: Tensor) -> dict[str, Any]:
        """Compute what the signals need of one batch `[B, 1, H, W]` on the model's device, in inference mode."""

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return torch.device("cpu")

    def freeze(self, precision: str | None = None) -> "Scorer":  # noqa: ARG002
        """Return an inference copy that is faster where there is something to gain, else the model itself.

        Args:
            precision: `"float32"` or `"bfloat16"`; None is `scoring_precision`.
        """
        return self

    def pictures(self, images: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Return images worth showing beside the input by name, `[B, H, W]` each; none by default."""
        return {}

    def batch_signals(self, images: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return signals of one batch on the model's device: name to `[B]`, float64, on that device."""
        outputs = self.outputs(images)
        return {name: SIGNALS[name].compute(outputs).to(torch.float64) for name in names}

    @torch.inference_mode()
    def location_values(self, images: object) -> dict[str, np.ndarray]:
        """Return the values that a calibration standardizes at each location, by signal that has them: `[n, L]`."""
        names = [name for name in self.signal_names if SIGNALS[name].locations is not None]
        found: dict[str, list[Tensor]] = {}
        for batch, count in self._padded_batches(images, BATCH) if names else ():
            outputs = self.outputs(batch)
            for name in names:
                values = SIGNALS[name].locations(outputs)  # type: ignore[misc]  # chosen above
                found.setdefault(name, []).append(values[:count].double().cpu())
        return {name: torch.cat(values).numpy() for name, values in found.items()}

    def set_location_units(self, units: LocationUnits) -> None:  # noqa: B027  # most classes have no such signal
        """Standardize locations by these means and deviations."""

    def check_locations(self, units: LocationUnits) -> None:
        """Raise `InputError` for means and deviations of signals or locations that the model does not have."""
        if units:
            raise InputError(f"calibration: locations must be of the model's signals, got {', '.join(units)}")

    @property
    def map_names(self) -> tuple[str, ...]:
        """The maps that `maps` draws, names of `simsid.models.signals.MAPS`: those of the signals that have one."""
        return tuple(name for name in self.signal_names if SIGNALS[name].map is not None)

    def choose_map(self, name: str | None = None) -> str:
        """Return `name`; where it is None, the model's own signal if that has a map, else the first that has.

        Raises:
            InputError: a signal without a map, or a model without any; the message lists the choices.
        """
        if not self.map_names:
            raise InputError(f"none of the model's signals has a map: {', '.join(self.signal_names)}")
        if name is None:
            return self.signal if self.signal in self.map_names else self.map_names[0]
        return check_signals(name, self.map_names)[0]

    def signals(
        self, images: object, names: Iterable[str] | None = None, *, batch_size: int = BATCH
    ) -> dict[str, np.ndarray]:
        """Return the raw signals of `images`: name to `[B]`, float64, higher is more anomalous.

        Nothing is normalized across images, so an image's values do not depend on its neighbors. Every batch has one
        size, the last is padded: the values do not depend on the number of images either.

        Args:
            images: see the class.
            names: the signals wanted; None is every one of `signal_names`.
            batch_size: images of a forward pass. Another size moves the last digits, as libraries then sum in another
                order: scores that are compared need one size.

        Raises:
            InputError: a signal that the model does not have, images of another size or outside -1..1.
        """
        return self.launch_signals(images, names, batch_size=batch_size)()

    @torch.inference_mode()
    def launch_signals(
        self, images: object, names: Iterable[str] | None = None, *, batch_size: int = BATCH
    ) -> Callable[[], dict[str, np.ndarray]]:
        """Start computing what `signals` returns; the function returned waits for a GPU and returns it."""
        names = self.signal_names if names is None else check_signals(names, self.signal_names)
        columns: dict[str, list[Tensor]] = {name: [] for name in names}
        frozen = self._inference_copy()
        for batch, count in frozen._padded_batches(images, batch_size):
            found = frozen.batch_signals(batch, names)
            for name in names:
                columns[name].append(found[name][:count])
        joined = {name: torch.cat(values) if values else torch.zeros(0) for name, values in columns.items()}
        return lambda: {name: values.double().cpu().numpy() for name, values in joined.items()}

    def maps(self, images: object, name: str, *, batch_size: int = BATCH) -> Tensor:
        """Return where in each image signal `name` comes from: float32 `[B, H, W]` on the CPU, higher is anomalous.

        Raises:
            InputError: a name that is not among `map_names`, which also lists the maps of memories that are no signal.
        """
        return self.several_maps(images, (name,), batch_size=batch_size)[name]

    @torch.no_grad()
    def several_maps(self, images: object, names: Iterable[str], *, batch_size: int = BATCH) -> dict[str, Tensor]:
        """Return the maps of several signals from one pass over the images, as `maps` returns each."""
        found: dict[str, list[Tensor]] = {name: [] for name in check_signals(names, self.map_names)}
        frozen = self._inference_copy()
        for batch, count in frozen._padded_batches(images, batch_size):
            outputs = frozen.outputs(batch)
            for name, parts in found.items():
                values = MAPS[name].compute(outputs)
                parts.append(upsampled(values[:count], (batch.shape[2], batch.shape[3])).cpu())
        return {name: torch.cat(parts) for name, parts in found.items()}

    def calibrated(self) -> Calibration:
        """Return the calibration.

        Raises:
            CalibrationError: there is none, or one of another precision than `scoring_precision`; with the remedy.
        """
        if self.calibration is None:
            raise CalibrationError(
                "the model is not calibrated: call calibrate(images) with normal images, or finish its training"
            )
        if self.calibration.precision != self.scoring_precision:
            raise CalibrationError(
                f"the model is calibrated in {self.calibration.precision}, and scores in {self.scoring_precision} must "
                "not be judged by that: use precision auto, or calibrate again in the other precision"
            )
        return self.calibration

    def score(self, images: object, *, signal: str | None = None) -> Tensor:
        """Return the anomaly score of `images`: `[B]` float64 in 0..1, 1 is anomalous.

        The score is a signal, by default the model's own, standardized on normal images. Rank and threshold on
        `signals` instead: the sigmoid ties scores far from the mean.

        Raises:
            CalibrationError: the model has not been calibrated.
        """
        name = signal or self.signal
        raw = self.signals(images, [name])[name]
        score = torch.from_numpy(self.calibrated().probability(name, raw))
        return score.to(images.device) if isinstance(images, Tensor) else score

    def _inference_copy(self) -> "Scorer":
        """Return what one call computes with; it may share weights with the model."""
        return self

    def _padded_batches(self, images: object, size: int) -> Iterator[tuple[Tensor, int]]:
        """Yield batches of `size` images on the model's device, and how many images of each are not padding."""
        size = require_whole_number("batch_size", size, least=1)
        side = self.preprocessing.image_size
        for part in as_batches(images):
            if tuple(part.shape[1:]) != (1, side, side) or not len(part):
                raise InputError(f"images must have shape [B, 1, {side}, {side}], B at least 1, got {list(part.shape)}")
            for start in range(0, len(part), size):
                batch = part[start : start + size]
                if self.device.type == "cuda" and not batch.is_cuda:
                    # From pinned memory, or the host would wait for all that the device still has to do.
                    batch = batch.pin_memory()
                batch = batch.to(self.device, self._input_dtype, non_blocking=True)
                count = len(batch)
                if count < size:
                    batch = torch.cat([batch, batch[-1:].expand(size - count, -1, -1, -1)])
                yield batch, count

    @property
    def _input_dtype(self) -> torch.dtype:
        return torch.float32


class AnomalyModel(Scorer):
    """A detector that learns from normal images and scores others: a higher signal is more anomalous."""

    kind: ClassVar[str]
    """What `model.json` calls this class of models."""

    precisions: ClassVar[tuple[str, ...]] = ("float32",)
    """The arithmetic that the class can compute signals in."""

    @abc.abstractmethod
    def fit(
        self, train: object, val: object = None, *, progress: bool = False, group: ProcessGroup | None = None
    ) -> Self:
        """Learn from normal images, then calibrate; the normal images of `val` are held out for thresholds.

        Every rank of `group` receives the same images and ends with the same model; where the class can, they divide
        the work.
        """

    @abc.abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Return what `save` writes beside kind and calibration: tensors, and values for JSON."""

    @classmethod
    @abc.abstractmethod
    def from_state(cls, tensors: dict[str, Tensor], document: dict[str, Any], source: str, **options: object) -> Self:
        """Rebuild a model from `state`; values that do not fit are an `InputError` or `CheckpointError`."""

    def to_device(self, device: torch.device | str) -> Self:
        """Move the model to a device, in place; a class that computes on the CPU only stays there."""
        torch.device(device)
        return self

    def calibrate(self, images: object, holdout: object = None) -> None:
        """Measure mean and deviation of every signal on normal images, un-augmented.

        Args:
            images: normal images that the model was trained on; see the class.
            holdout: normal images that it was not trained on, for thresholds at a chosen false positive rate, and where
                there are at least 30 for the statistics at each location. With fewer these come from `images`, or stay
                as they were where `holdout` is `images` itself: the images of another site.
        """
        local = holdout is images
        # Both are read twice, which an iterator cannot be.
        images, holdout = (list(source) if isinstance(source, Iterator) else source for source in (images, holdout))
        precision = self._calibration_precision()
        frozen = self.freeze(precision)
        former = self.calibration.locations if self.calibration else {}
        held = {} if holdout is None else frozen.location_values(holdout)
        units, judged = standardize_locations(
            held, lambda: former if local else location_statistics(frozen.location_values(images))
        )
        frozen.set_location_units(units)
        if frozen is not self:
            frozen.calibration = None  # it may lack signals that are measured now
        kept = None if holdout is None else {**frozen.signals(holdout), **judged}
        signals = {**frozen.signals(images), **(judged if local else {})}
        self.calibration = Calibration.fit(signals, kept, precision, units)

    def _calibration_precision(self) -> str:
        """Return the precision to calibrate in: the one asked for, and float32 for `"auto"`.

        bfloat16 is twice as fast on a CPU with instructions for it, but rounding the reconstruction changes the
        discriminator's logit about as much as another normal image does: benchmarks/precision.py has the table.
        """
        return "float32" if self.precision == "auto" else self.precision

    def adapt(self, images: object, *, progress: bool = False) -> Adaptation:  # noqa: ARG002
        """Add a site's own normal images to the model and recalibrate on them, where its class can.

        Raises:
            InputError: the class cannot, or the images cannot be used.
        """
        raise InputError(
            f"a model of kind {self.kind!r} cannot be adapted; recalibrate it with: simsid calibrate --local"
        )

    def memories(self, images: object) -> tuple[MemoryContents, ...]:  # noqa: ARG002
        """Return what the model's memories hold and what normal images use of it; nothing for a model without.

        Args:
            images: normal images; see `Scorer`.
        """
        return ()

    def nearest_images(self, images: object) -> Tensor | None:  # noqa: ARG002
        """Return which stored images are nearest to each of `images`, `[B, k]` int64, nearest first.

        An image's number is its position among the training images. None: the model stores no images, or not all.
        """
        return None

    def save(self, folder: str | os.PathLike) -> None:
        """Write the model and its calibration to `folder`, atomically: tensors as safetensors, the rest as JSON.

        Raises:
            InputError: the folder holds a model of another kind, perhaps with the run that trained it.
        """
        require_path("folder", folder)
        there = _kind_in(folder)
        if there not in (None, self.kind):
            raise InputError(
                f"{os.fspath(folder)} holds a model of kind {there!r}, which one of kind {self.kind!r} must not "
                "replace; choose another folder"
            )
        tensors, document = self.state()
        calibration = self.calibration.to_dict() if self.calibration else None
        checkpoint.write(folder, "model", tensors, {"kind": self.kind, "calibration": calibration, **document})

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        *,
        device: torch.device | str = "cpu",
        precision: str = "auto",
        **options: object,
    ) -> Self:
        """Read a model that `save` or a training run wrote, in inference mode; nothing in the files is executed.

        Args:
            folder: the model's folder.
            device: where it will compute.
            precision: `"float32"`, `"bfloat16"`, or `"auto"`, that of the model's calibration.
            **options: keyword arguments of the class that are not saved.

        Raises:
            CheckpointError: the folder holds no model, a damaged one, or one of another kind.
            InputError: a precision that the class does not compute in.
        """
        check_precision(precision, cls.precisions)
        source = f"{require_path('folder', folder)}/model.json"
        device = require_device(device)
        tensors, document = checkpoint.read(folder, "model")
        if document.get("kind") != cls.kind:
            raise CheckpointError(f"{source}: kind must be {cls.kind!r}, got {document.get('kind')!r}")
        try:
            calibration = document["calibration"]
            model = cls.from_state(tensors, document, source, **options)
            model.calibration = Calibration.from_dict(calibration) if calibration else None
            if model.calibration is not None and model.signal not in model.calibration.mean:
                raise InputError(f"calibration lacks the model's signal {model.signal!r}")
            model.check_locations(model.calibration.locations if model.calibration else {})
        except KeyError as error:
            raise CheckpointError(f"{source} is not a model: it has no {error}") from None
        except InputError as error:
            raise CheckpointError(f"{source} is not a model: {error}") from None
        model.precision = precision
        return model.to_device(device)

    def identity(self) -> str:
        """Return a hash of all that decides a score: configuration, calibration, tensors and their layout."""
        tensors, document = self.state()
        calibration = self.calibration.to_dict() if self.calibration else None
        text = json.dumps([self.kind, document, calibration], sort_keys=True)
        return checkpoint.digest(text, dict(sorted(tensors.items())))


def _kind_in(folder: str | os.PathLike) -> object:
    """Return the kind of the model in a folder; None where there is none, or nothing that can be read."""
    try:
        return json.loads((pathlib.Path(folder) / "model.json").read_text("utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        return None


def warn_of_abnormal(train: object) -> None:
    """Warn where images that are learned as normal are labeled abnormal."""
    if isinstance(train, ImageSet) and (count := int((train.labels == 1).sum())):
        warnings.warn(
            f"{count} of {len(train)} training images are labeled abnormal and are learned as normal; leave them out "
            "with train.select(train.labels != 1)",
            stacklevel=3,
        )

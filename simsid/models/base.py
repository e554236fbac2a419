"""The interface that every anomaly model implements; scoring, evaluation, reports and commands know nothing else."""

import abc
import json
import os
import pathlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from simsid import checkpoint
from simsid.arguments import require_device, require_path
from simsid.data import ImageSet
from simsid.distributed import ProcessGroup
from simsid.errors import CheckpointError, InputError
from simsid.models.calibration import FEWEST_HELD, Calibration, location_statistics, standardize_locations
from simsid.models.memory_contents import MemoryContents
from simsid.models.scorer import Scorer
from simsid.models.signals import SIGNALS
from simsid.precision import check_precision


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
                there are at least 30 for the statistics at each location. With fewer these come from `images`; where
                `holdout` is `images` itself, the images of another site, a calibrated model keeps its former ones.

        Raises:
            InputError: fewer than 30 images of another site, and the former calibration lacks the statistics that the
                model's own signal is standardized by.
        """
        local = holdout is images
        # Both are read twice, which an iterator cannot be.
        images, holdout = (list(source) if isinstance(source, Iterator) else source for source in (images, holdout))
        precision = self._calibration_precision()
        frozen = self.freeze(precision)
        standardized = SIGNALS[self.signal].locations is not None
        former = self.calibration.locations if self.calibration else {}
        # A first calibration on few local images has nothing to keep, and the model's own signal needs something.
        keeps_former = local and (self.calibration is not None or not standardized)
        if frozen is not self:
            frozen.calibration = None  # it may lack signals that are measured now
        held = {} if holdout is None else frozen.location_values(holdout)
        units, judged = standardize_locations(
            held,
            lambda: former if keeps_former else location_statistics(frozen.location_values(images)),
        )
        if keeps_former and standardized and self.signal not in units:
            raise InputError(f"calibrating {self.signal} takes at least {FEWEST_HELD} normal images of a new site")
        frozen.set_location_units(units)
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
            f"a model of kind {self.kind!r} cannot be adapted; recalibrate it with: simsid calibrate MODEL FOLDER "
            "--local -o NEW"
        )

    def revert(self) -> None:
        """Undo every `adapt`, where the class can be adapted.

        Raises:
            InputError: the model is not adapted.
        """
        raise InputError(f"a model of kind {self.kind!r} is never adapted: there is nothing to undo")

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

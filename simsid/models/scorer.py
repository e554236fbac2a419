"""What computes signals, maps and scores of batches: a model, or a frozen copy of one."""

import abc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simsid.arguments import require_whole_number
from simsid.data import Preprocessing, as_batches
from simsid.errors import CalibrationError, InputError
from simsid.models.calibration import Calibration, LocationUnits
from simsid.models.signals import MAPS, SIGNALS, check_signals, upsampled

BATCH = 16
"""Images of a forward pass. Fewer are padded to it: libraries sum in another order for another batch size, which would
change the last digits of a score."""


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
            InputError: a signal without a map, a model without any, or a calibration that lacks what the model's own
                signal is standardized by; the message lists the choices.
        """
        if not self.map_names:
            raise InputError(f"none of the model's signals has a map: {', '.join(self.signal_names)}")
        if name is None:
            (own,) = check_signals(self.signal, self.signal_names)
            return own if own in self.map_names else self.map_names[0]
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
                f"not be judged by that: use precision auto, or {self._remedy_for_precision()}"
            )
        return self.calibration

    def _remedy_for_precision(self) -> str:
        """Return what gives scores in `scoring_precision`, where the calibration is in another one."""
        return f"calibrate it again: simsid calibrate MODEL FOLDER --precision {self.scoring_precision}"

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

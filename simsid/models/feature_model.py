"""What all models on features of a frozen encoder have in common."""

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from simsid.data import ImageSet, Preprocessing, as_image_set
from simsid.distributed import ProcessGroup
from simsid.errors import CheckpointError, ConfigError, InputError
from simsid.models.base import AnomalyModel, warn_of_abnormal
from simsid.models.calibration import Calibration
from simsid.models.feature_config import FeatureConfig
from simsid.models.feature_encoder import FeatureEncoder
from simsid.models.feature_inpainting import to_grid
from simsid.models.feature_pooled import pool
from simsid.models.feature_sample import FeatureSample, gather
from simsid.models.scorer import BATCH

FEWEST = 8
"""Normal images that fitting and adapting need: means, deviations and two folds of fewer say nothing."""


class FeatureModel(AnomalyModel):
    """A frozen encoder, a configuration, and `parts`, the tensors that are fitted to normal images.

    Args:
        config: a `FeatureConfig`; None is `FeatureConfig()`.
        encoder: a module that yields feature maps `[B, C, h, w]`; None is EfficientNet-Lite0 with the ImageNet weights
            that ship with simsid. It is frozen in place. A saved model holds the encoder's class and a hash of its
            weights, not the weights: `simsid.load(folder, encoder=module)` needs it again.
        layers: names of submodules of the encoder whose outputs are the feature maps, collected by hooks; empty where
            the encoder returns its maps (one, or a list, tuple or dictionary).
        **overrides: single fields of the configuration, as in `FeatureMemory(weight="uniform")`.

    Raises:
        ConfigError: a configuration that cannot be built; the message names the field.
        InputTypeError: an encoder that is not a module.
        InputError: a layer that the encoder does not have.
    """

    precisions: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")

    def __init__(
        self,
        config: FeatureConfig | None = None,
        *,
        encoder: nn.Module | None = None,
        layers: Sequence[str] | None = None,
        **overrides: object,
    ) -> None:
        if config is not None and not isinstance(config, FeatureConfig):
            raise ConfigError(f"config must be a FeatureConfig, got {config!r}")
        if layers is not None:
            overrides["layers"] = layers
        self.config = (config or FeatureConfig()).replace(**overrides)
        self.encoder = FeatureEncoder(encoder, self.config.layers, self.config.inputs)
        self.calibration: Calibration | None = None
        self.parts: nn.Module | None = None
        """What was fitted; None before `fit`."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How files become the images this model takes."""
        return Preprocessing(self.config.image_size, self.config.aspect, self.config.intensity)

    @property
    def device(self) -> torch.device:
        """Where encoder and memories are."""
        return self.encoder.mean.device

    def to_device(self, device: torch.device | str) -> Self:
        """Move encoder and memories to a device, in place."""
        self.encoder.to(device)
        if self.parts is not None:
            self.parts.to(device)
        return self

    def describe(self, images: Tensor, precision: str | None = None) -> tuple[list[Tensor], Tensor]:
        """Return pooled features `[B, C]` of the deepest layers, and features of the locations, `[B, L, C]`.

        Args:
            images: `[B, 1, H, W]` in -1..1.
            precision: of the encoder; None is `scoring_precision`.
        """
        maps = self.encoder(images, precision or self.scoring_precision)
        return pool(maps[-self.config.pooled_layers :], self.config.weight), to_grid(maps, self.config.grid)

    def sample(
        self,
        source: object,
        copies: Collection[str] = (),
        *,
        progress: bool = False,
        group: ProcessGroup | None = None,
        precision: str | None = None,
    ) -> FeatureSample:
        """Encode at most `config.most_images` of a source's images and `copies` of them, see `gather`."""
        shown = progress and (group is None or group.main)

        def batches() -> Iterator[Tensor]:
            from tqdm import tqdm

            total = len(source) if isinstance(source, (ImageSet, Tensor, np.ndarray)) else None
            # None: only on a terminal, as a file would keep every step of the bar.
            disable = None if shown else True
            with tqdm(desc="encoding", total=total, unit=" images", disable=disable, dynamic_ncols=True) as bar:
                for batch, count in self._padded_batches(source, BATCH):
                    yield batch[:count]
                    bar.update(count)

        describe = functools.partial(self.describe, precision=precision)
        return gather(batches(), describe, self.config, copies, group)

    def training_sample(
        self,
        train: object,
        copies: Collection[str] = (),
        *,
        progress: bool = False,
        group: ProcessGroup | None = None,
    ) -> FeatureSample:
        """Return the sample of training images; fewer than 8 are an `InputError`."""
        warn_of_abnormal(train)
        precision = super()._calibration_precision()
        sample = self.sample(train, copies, progress=progress, group=group, precision=precision)
        if sample.count < FEWEST:
            raise InputError(f"train must have at least {FEWEST} normal images, got {sample.count}")
        return sample

    def calibrate_fitted(self, signals: dict[str, np.ndarray], val: object, group: ProcessGroup | None = None) -> None:
        """Calibrate on the training images' signals; the normal images of `val`, or the same, set thresholds."""
        group = group or ProcessGroup()
        held, precision = signals, super()._calibration_precision()
        # The images held out must be encoded as those that the model was fitted to.
        self.calibration = Calibration.fit(signals, held, precision)
        if val is not None:
            val_set = as_image_set(val, name="val", preprocessing=self.preprocessing)
            normal = np.flatnonzero(val_set.labels != 1)
            if len(normal):
                own = self.signals(val_set.select(normal[group.rank :: group.size]))
                held = group.interleave(own, len(normal))
        self.calibration = Calibration.fit(signals, held, precision)

    def _calibration_precision(self) -> str:
        """Return the precision of the features that the model was fitted to; refuse another one."""
        return self.calibrated().precision if self.calibration is not None else super()._calibration_precision()

    @property
    def _preset(self) -> str:
        """What `simsid train --preset` calls the class."""
        return self.kind

    def _remedy_for_precision(self) -> str:
        return (
            "fit another model, whose memory has features of that precision: simsid train FOLDER "
            f"--preset {self._preset} --precision {self.scoring_precision} -o NEW"
        )

    def document(self) -> dict[str, object]:
        """Return what `model.json` says of configuration and encoder."""
        return {"config": self.config.to_dict(), "encoder": self.encoder.fingerprint()}

    @classmethod
    def from_document(cls, document: dict[str, Any], source: str, options: dict[str, Any]) -> Self:
        """Rebuild a model without its parts; the option `encoder` is the module of one with a foreign encoder."""
        config, saved = FeatureConfig.from_dict(document["config"]), document["encoder"]
        if not isinstance(saved, dict) or saved.keys() != {"foreign", "network", "sha256"}:
            raise InputError("encoder must hold foreign, network and sha256")
        if saved["foreign"] and options.get("encoder") is None:
            raise CheckpointError(
                f"{source} was fitted to the features of {saved['network']}, which is not part of simsid: "
                "load it with encoder=module"
            )
        model = cls(config, **options)
        if model.encoder.fingerprint() != saved:
            raise CheckpointError(
                f"{source} was fitted to the features of {saved['network']} with other weights than those of the "
                f"encoder {model.encoder.fingerprint()['network']}"
            )
        return model


def checked_sizes(values: object, largest: int) -> list[int]:
    """Return a list of whole numbers in 1 to `largest` from a file; anything else is an `InputError`."""
    if not isinstance(values, list) or not values or not all(type(n) is int and 0 < n <= largest for n in values):
        raise InputError(f"sizes must be whole numbers in 1 to {largest}, got {values!r}")
    return values

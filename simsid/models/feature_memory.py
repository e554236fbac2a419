"""The feature memory: a frozen pretrained encoder with memories of what normal images look like to it."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from simsid import checkpoint
from simsid.data import ImageSet
from simsid.distributed import ProcessGroup
from simsid.errors import InputError
from simsid.models.base import Adaptation
from simsid.models.calibration import Calibration
from simsid.models.feature_config import FeatureConfig
from simsid.models.feature_contents import feature_memories
from simsid.models.feature_model import FEWEST, FeatureModel, checked_sizes
from simsid.models.feature_parts import FeatureParts
from simsid.models.feature_sample import FeatureSample
from simsid.models.memory_contents import MemoryContents
from simsid.models.scorer import BATCH

ABNORMAL = 3.5  # robust deviations above the median from which `adapt` names an image


class FeatureMemory(FeatureModel):
    """Normal images as a frozen pretrained network sees them: fitted in two minutes on a CPU, without training.

        pooled_memory = distance of the image's mean features to the nearest normal ones (`PooledMemory`)
        inpainting    = error of predicting each location from its neighbors' memory look-ups (`FeatureInpainting`)
        synthetic     = logit against painted opacities (`SyntheticClassifier`), with `synthetic=True`
        combined      = pooled_memory + 0.3 inpainting (+ 0.25 synthetic)

    Every signal is in units of normal images' deviation, each image judged without itself. `inpainting` and `combined`
    have a map, the in-painting's error at each location.

    Source: SimSID (arXiv 2403.08689) and SQUID (arXiv 2111.13495): memory and in-painting on an encoder that can be any
    backbone; here it is frozen, and nothing is reconstructed in pixels.

    The scores of an image are the same, bit for bit, whatever images are scored with it, for one batch size.

    Arguments and errors are those of `FeatureModel`.

    Examples:
        Other networks, which the caller downloads::

            from torchvision.models import ResNet18_Weights, resnet18
            network = resnet18(weights=ResNet18_Weights.DEFAULT)
            model = simsid.FeatureMemory(encoder=network, layers=("layer2", "layer3"))

            import timm
            network = timm.create_model("convnext_tiny", pretrained=True, features_only=True)
            model = simsid.FeatureMemory(encoder=network)
    """

    kind: ClassVar[str] = "feature_memory"

    parts: FeatureParts | None

    def __init__(self, config: FeatureConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.original: dict[str, Any] | None = None
        """What `revert` restores; None in a model that is not adapted."""

    @property
    def signal(self) -> str:
        """The configured signal."""
        return self.config.signal

    @property
    def signal_names(self) -> tuple[str, ...]:
        """`pooled_memory`, `inpainting`, `combined`, and `synthetic` where configured."""
        return self.config.signal_names

    @torch.no_grad()
    def outputs(self, images: Tensor) -> dict[str, Any]:
        """Return `pooled_memory`, `inpainting`, `synthetic` where configured, and `combined`, `[B]` float64 each, and
        `inpainting_map` `[B, grid, grid]`."""
        return {"images": images, **self._fitted()(*self.describe(images))}

    @torch.no_grad()
    def fit(
        self,
        train: object,
        val: object = None,
        *,
        progress: bool = False,
        group: ProcessGroup | None = None,
    ) -> "FeatureMemory":
        """Fit the memories to normal images and calibrate.

        The calibration's mean and deviation come from the training images, each judged without itself: by the other
        images' rows in the memory and by a prediction fitted to the other half. Thresholds come from the normal images
        of `val`, or, without it, from the same values.

        Args:
            train: normal images, see `AnomalyModel`; an iterable is read once, and at most `config.most_images` images,
                a uniform sample, are encoded and kept as features. No pixels are kept.
            val: images held out for thresholds, kept in memory; those labeled abnormal are left out.
            progress: whether to show a bar.
            group: ranks that divide the encoding; each has the same images and ends with the same model.

        Raises:
            InputError: fewer than 8 images, or images of another size.
        """
        group = group or ProcessGroup()
        copies = ("jittered", "painted") if self.config.synthetic else ("jittered",)
        sample = self.training_sample(train, copies, progress=progress, group=group)
        # By one rank: another number of threads, or another GPU, would give the others another model.
        parts, signals = group.broadcast(lambda: self._fitted_parts(sample))
        self.parts, self.original = parts.to(self.device), None
        self.calibrate_fitted(signals, val, group)
        return self

    def _fitted_parts(self, sample: FeatureSample) -> tuple[FeatureParts, dict[str, np.ndarray]]:
        parts = FeatureParts(self.config, [x.shape[1] for x in sample.clean], sample.grid.shape[2]).to(self.device)
        return parts, _arrays(parts.fit(sample.to(self.device), self.config), self.signal_names)

    @torch.no_grad()
    def adapt(self, images: object, *, progress: bool = False) -> Adaptation:
        """Add a site's own normal images to the pooled memory and recalibrate on them.

        Radiographs of another machine or population lie farther from the memory, all of them: scores rise and
        thresholds no longer hold. Each image is judged without its own rows, so 8 images suffice and none is lost for
        calibration; their values also set the unit of every signal, and the thresholds. The in-painting's items and
        matrices stay, only its unit follows. Images that look abnormal among the others are named, not left out: look
        at them, `revert`, and adapt with the others.

        Args:
            images: normal images, see `AnomalyModel`; those that are in the memory already are left out.
            progress: whether to show a bar.

        Returns:
            Counts, and the images that look abnormal.

        Raises:
            InputError: fewer than 8 images that are not in the memory yet.
        """
        parts = self._fitted()
        sample = self.sample(images, ("jittered",), progress=progress)
        new = (parts.pooled.own_rows(sample.clean) < 0).nonzero()[:, 0] if sample.count else torch.zeros(0)
        if len(new) < FEWEST:
            held = f" of {sample.count}, as it holds the others" if len(new) < sample.count else ""
            raise InputError(f"adapt needs at least {FEWEST} images that the memory lacks, got {len(new)}{held}")
        if self.original is None:
            calibration = self.calibration.to_dict() if self.calibration else None
            self.original = {"images": parts.pooled.images, "units": parts.units(), "calibration": calibration}
        signals = _arrays(parts.add(sample, new), self.signal_names)
        self.calibration = Calibration.fit(signals, signals, self.scoring_precision)
        names = images.paths if isinstance(images, ImageSet) and len(images) == sample.count else None
        abnormal = tuple(
            (names[new[i]] if names else str(int(new[i])), value) for i, value in _outliers(signals["combined"])
        )
        return Adaptation(len(new), sample.count - len(new), self.original["images"], abnormal)

    def revert(self) -> None:
        """Undo every adaptation: the memory, its units and the calibration are as fitted.

        Raises:
            InputError: the model is not adapted.
        """
        parts = self._fitted()
        if self.original is None:
            raise InputError("the model is not adapted: there is nothing to undo")
        parts.pooled.truncate(self.original["images"])
        parts.set_units(self.original["units"])
        calibration = self.original["calibration"]
        self.calibration = Calibration.from_dict(calibration) if calibration else None
        self.original = None

    @torch.no_grad()
    def calibrate(self, images: object, holdout: object = None) -> None:
        """Measure mean and deviation of every signal on normal images, each judged without its own rows of the memory.

        `fit` and `adapt` calibrate by themselves. Images that the in-painting was fitted to are judged a little too
        normal by it here, as its prediction knows them; `fit` uses two folds.

        Args:
            images: normal images; see `AnomalyModel`.
            holdout: normal images that the model was not fitted to, for thresholds.
        """
        precision = self._calibration_precision()
        # Images held out may be in the memory too, as those that the model was adapted to are.
        held = None if holdout is None else self._judged_without_itself(holdout)
        self.calibration = Calibration.fit(self._judged_without_itself(images), held, precision)

    @torch.no_grad()
    def memories(self, images: object) -> tuple[MemoryContents, ...]:
        """Return the in-painting's items and the pooled memory's images, and what `images` use of them."""
        return feature_memories(self._fitted(), self._described(images))

    @torch.no_grad()
    def nearest_images(self, images: object) -> Tensor | None:
        """Return the numbers of the images in the pooled memory that are nearest to each image, itself left out."""
        parts = self._fitted()
        if parts.pooled.images >= self.config.most_images:
            return None  # perhaps a sample of the training images, of which no numbers are kept
        return torch.cat([parts.pooled.nearest(layers).cpu() for layers, _ in self._described(images)])

    def _described(self, images: object) -> Iterator[tuple[list[Tensor], Tensor]]:
        for batch, count in self._padded_batches(images, BATCH):
            pooled, grid = self.describe(batch)
            yield [x[:count] for x in pooled], grid[:count]

    def _judged_without_itself(self, images: object) -> dict[str, np.ndarray]:
        """Return the signals of images, each judged without its own rows of the memory where it is in there."""
        parts = self._fitted()
        columns: dict[str, list[Tensor]] = {name: [] for name in self.signal_names}
        for batch, count in self._padded_batches(images, BATCH):
            # All of a padded batch: a product of fewer rows sums in another order.
            pooled, grid = self.describe(batch)
            judged = parts(pooled, grid, parts.pooled.own_rows(pooled))
            for name, values in columns.items():
                values.append(judged[name][:count])
        signals = {name: torch.cat(values) for name, values in columns.items() if values}
        return _arrays(signals, tuple(signals))

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Return the memories, and configuration, sizes and what identifies the encoder."""
        parts = self._fitted()
        document = {
            **self.document(),
            "channels": list(parts.pooled.channels),
            "grid_channels": len(parts.inpainting.mean),
            "images": parts.pooled.images,
            "original": self.original,
        }
        return checkpoint.tensors(parts), document

    @classmethod
    def from_state(
        cls, tensors: dict[str, Tensor], document: dict[str, Any], source: str, **options: object
    ) -> "FeatureMemory":
        """Rebuild a model from `state`; the option `encoder` is the module of a model with a foreign encoder."""
        model = cls.from_document(document, source, options)
        channels, images = checked_sizes(document["channels"], 65536), checked_sizes([document["images"]], 1 << 24)[0]
        sizes = (channels, checked_sizes([document["grid_channels"]], 1 << 20)[0], images)
        # On the meta device first: sizes from a foreign file are compared before any memory is taken for them.
        with torch.device("meta"):
            checkpoint.check_shapes(FeatureParts(model.config, *sizes), tensors, source)
        model.parts = FeatureParts(model.config, *sizes)
        checkpoint.load_state(model.parts, tensors, source)
        model.original = _checked_original(document["original"], model.parts)
        return model

    @property
    def _preset(self) -> str:
        return "features"

    def _fitted(self) -> FeatureParts:
        if self.parts is None:
            raise InputError("the feature memory is empty: call fit(images) with normal images first")
        return self.parts


def _checked_original(original: object, parts: FeatureParts) -> dict[str, Any] | None:
    """Return what `revert` restores, from a file, after a check that it can."""
    if original is None:
        return None
    if not isinstance(original, dict) or original.keys() != {"images", "units", "calibration"}:
        raise InputError("original must hold images, units and calibration")
    checked_sizes([original["images"]], parts.pooled.images)
    adapted = parts.units()
    parts.set_units(original["units"])
    parts.set_units(adapted)
    if original["calibration"] is not None:
        Calibration.from_dict(original["calibration"])
    return original


def _arrays(scores: dict[str, Tensor], names: Sequence[str]) -> dict[str, np.ndarray]:
    return {name: scores[name].double().cpu().numpy() for name in names}


def _outliers(values: np.ndarray) -> list[tuple[int, float]]:
    """Return index and robust deviations above the median of what lies far above it, farthest first."""
    median = np.median(values)
    scale = 1.4826 * np.median(np.abs(values - median)) + 1e-12
    deviations = (values - median) / scale
    return [(int(i), float(deviations[i])) for i in np.argsort(-deviations) if deviations[i] > ABNORMAL]

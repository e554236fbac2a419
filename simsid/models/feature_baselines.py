"""Published detectors on the features of the feature memory: what its memories must beat with the same encoder."""

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from simsid import checkpoint
from simsid.distributed import ProcessGroup
from simsid.errors import CheckpointError, InputError
from simsid.models.feature_config import FeatureConfig
from simsid.models.feature_model import FeatureModel, checked_sizes
from simsid.models.feature_pooled import location_weight
from simsid.models.feature_sample import FeatureSample

CORESET = 0.01  # of all patches, the smallest fraction of the paper
SKETCH = 32  # random directions in which PatchCore's coreset is searched
NOT_FITTED = "{} has learned nothing yet: call fit(images) with normal images first"


class Detector(nn.Module, abc.ABC):
    """A density or distance model of features; its buffers are what is saved.

    One image is judged at a time, as a matrix product on a CPU sums a row in an order that depends on the row's index.

    Args:
        config: see `FeatureConfig`; a detector reads `neighbors`, `components` and `seed`.
    """

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.config = config

    @abc.abstractmethod
    def fit(self, sample: FeatureSample) -> None:
        """Fit to normal images."""

    @abc.abstractmethod
    def forward(self, pooled: Sequence[Tensor], grid: Tensor) -> Tensor:
        """Return the distance of each location `[B, L]`, or of the whole image `[B, 1]`."""

    def _keep(self, **tensors: Tensor) -> None:
        # In the order of a file, which is by name: a model's identity hashes the tensors in order.
        for name in sorted(tensors):
            self.register_buffer(name, tensors[name].contiguous())


class FeatureBaseline(FeatureModel):
    """A published detector on a frozen encoder's features, calibrated by cross-fitting.

    Its image score is the mean over the locations with the weight of the configuration, as in the feature memory, so
    that only the detector differs; `reduce = "max"` is that of the papers where they take the largest.

    Arguments and errors are those of `FeatureModel`.
    """

    detector: ClassVar[type[Detector]]
    reduce: ClassVar[str] = "mean"
    parts: Detector | None

    @property
    def signal(self) -> str:
        """The baseline's only signal."""
        return self.kind

    @property
    def signal_names(self) -> tuple[str, ...]:
        """The baseline's only signal."""
        return (self.kind,)

    @torch.no_grad()
    def outputs(self, images: Tensor) -> dict[str, Any]:
        """Return the signal's entry `[B]`, and `<kind>_map` `[B, grid, grid]` where the detector has locations."""
        if self.parts is None:
            raise InputError(NOT_FITTED.format(self.kind))
        return {"images": images, **self._judged(self.parts, *self.describe(images))}

    @torch.no_grad()
    def fit(
        self, train: object, val: object = None, *, progress: bool = False, group: ProcessGroup | None = None
    ) -> Self:
        """Fit the detector to normal images and calibrate.

        The calibration judges each training image by a detector of the half of the images that it is not in.

        Args:
            train: normal images, see `AnomalyModel` and `FeatureMemory.fit`.
            val: images held out for thresholds; those labeled abnormal are left out.
            progress: whether to show a bar.
            group: ranks that divide the encoding; each has the same images and ends with the same model.

        Raises:
            InputError: fewer than 8 images, or images of another size.
        """
        group = group or ProcessGroup()
        sample = self.training_sample(train, progress=progress, group=group)
        parts, values = group.broadcast(lambda: self._cross_fitted(sample.to(self.device)))
        self.parts = parts.to(self.device)
        self.calibrate_fitted({self.kind: values}, val, group)
        return self

    def _cross_fitted(self, sample: FeatureSample) -> tuple[Detector, np.ndarray]:
        """Return the detector, and the images' values by detectors of the half of the images that each is not in."""
        fold = torch.arange(sample.count, device=sample.grid.device) % 2
        values = torch.zeros(sample.count, dtype=torch.float64)
        for own in (0, 1):
            detector = self._fitted_detector(sample.select((fold != own).nonzero()[:, 0]))
            part = sample.select((fold == own).nonzero()[:, 0])
            values[(fold == own).cpu()] = self._judged(detector, part.clean, part.grid.float())[self.kind].cpu()
        return self._fitted_detector(sample), values.numpy()

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Return the detector's tensors, and configuration, shapes and what identifies the encoder."""
        if self.parts is None:
            raise InputError(NOT_FITTED.format(self.kind))
        tensors = checkpoint.tensors(self.parts)
        return tensors, {**self.document(), "shapes": {name: list(x.shape) for name, x in tensors.items()}}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], document: dict[str, Any], source: str, **options: object) -> Self:
        """Rebuild a model from `state`; the option `encoder` is the module of a model with a foreign encoder."""
        model = cls.from_document(document, source, options)
        shapes = document["shapes"]
        if not isinstance(shapes, dict) or shapes.keys() != tensors.keys():
            raise CheckpointError(f"{source}: shapes must name the tensors {', '.join(sorted(tensors))}")
        detector = cls.detector(model.config)
        for name, tensor in tensors.items():
            if list(tensor.shape) != checked_sizes(shapes[name], 1 << 30) or not tensor.isfinite().all():
                raise CheckpointError(f"{source}: tensor {name} must have the shape in the document, and finite values")
        detector._keep(**tensors)
        model.parts = detector
        return model

    def _fitted_detector(self, sample: FeatureSample) -> Detector:
        detector = self.detector(self.config)
        detector.fit(sample)
        return detector.to(self.device)

    def _judged(self, detector: Detector, pooled: Sequence[Tensor], grid: Tensor) -> dict[str, Tensor]:
        distances = detector(pooled, grid)
        if distances.shape[1] == 1:
            return {self.kind: distances[:, 0].double()}
        side = self.config.grid
        weight = location_weight(self.config.weight, (side, side)).flatten().to(distances)
        score = (distances * weight).sum(1) if self.reduce == "mean" else distances.amax(1)
        return {self.kind: score.double(), f"{self.kind}_map": distances.unflatten(1, (side, side))}


class GlobalNeighbors(Detector):
    """Mean distance of the pooled features, standardized and side by side, to the k nearest normal images."""

    mean: Tensor
    std: Tensor
    rows: Tensor

    def fit(self, sample: FeatureSample) -> None:
        """Keep the pooled features of every image."""
        x = torch.cat(sample.clean, 1)
        mean, std = x.mean(0), x.std(0) + 1e-6
        self._keep(mean=mean, std=std, rows=(x - mean) / std)

    def forward(self, pooled: Sequence[Tensor], grid: Tensor) -> Tensor:  # noqa: ARG002
        """Return `[B, 1]`."""
        x = (torch.cat(list(pooled), 1) - self.mean) / self.std
        return torch.cat([_nearest(part, self.rows, self.config.neighbors)[:, None] for part in x.split(1)])


class LocationNeighbors(Detector):
    """Mean distance of each location's features to the k nearest at the same location of normal images."""

    rows: Tensor

    def fit(self, sample: FeatureSample) -> None:
        """Keep the features of every location in float16."""
        self._keep(rows=sample.grid.transpose(0, 1))

    def forward(self, pooled: Sequence[Tensor], grid: Tensor) -> Tensor:  # noqa: ARG002
        """Return `[B, L]`."""
        rows = self.rows.float()
        return torch.cat([_nearest(part.transpose(0, 1), rows, self.config.neighbors).T for part in grid.split(1)])


class Gaussians(Detector):
    """Mahalanobis distance of each location's features to the normal distribution of that location.

        d(x)^2 = (x - mu)^T (S + 0.01 I)^-1 (x - mu)

    Source: PaDiM (arXiv 2011.08785), equations 1 and 2, with a random choice of channels.
    """

    chosen: Tensor
    mean: Tensor
    inverse: Tensor

    def fit(self, sample: FeatureSample) -> None:
        """Estimate mean and covariance of each location."""
        channels = sample.grid.shape[2]
        generator = torch.Generator().manual_seed(self.config.seed)
        chosen = torch.randperm(channels, generator=generator)[: self.config.components].sort().values
        x = sample.grid[:, :, chosen.to(sample.grid.device)].float().transpose(0, 1)
        mean = x.mean(1, keepdim=True)
        covariance = (x - mean).transpose(1, 2) @ (x - mean) / (x.shape[1] - 1)
        regular = covariance + 0.01 * torch.eye(x.shape[2], device=x.device)
        # d^2 = |F^-1 (x - mu)|^2 with S = F F^T.
        eye = torch.eye(x.shape[2], device=x.device)
        factors = [torch.linalg.cholesky(matrix) for matrix in regular]
        inverse = torch.stack([torch.linalg.solve_triangular(factor, eye, upper=False) for factor in factors])
        self._keep(chosen=chosen, mean=mean[:, 0], inverse=inverse)

    def forward(self, pooled: Sequence[Tensor], grid: Tensor) -> Tensor:  # noqa: ARG002
        """Return `[B, L]`."""
        centered = grid[:, :, self.chosen] - self.mean
        whiten = self.inverse.transpose(1, 2)
        return torch.cat([torch.bmm(x.transpose(0, 1), whiten).norm(dim=2).T for x in centered.split(1)])


class PatchBank(Detector):
    """Distance of each location's features to the nearest of a coreset of all locations of normal images.

    Source: PatchCore (arXiv 2106.08265), section 3: locally aware patch features (here the average to the grid), greedy
    coreset (algorithm 1, searched in random directions). Its reweighting (equation 7) is left out.
    """

    rows: Tensor

    def fit(self, sample: FeatureSample) -> None:
        """Choose one patch in a hundred, at least one for each location of the grid."""
        patches = sample.grid.flatten(0, 1)
        count = max(sample.grid.shape[1], round(CORESET * len(patches)))
        self._keep(rows=patches[greedy_coreset(patches, count, self.config.seed)])

    def forward(self, pooled: Sequence[Tensor], grid: Tensor) -> Tensor:  # noqa: ARG002
        """Return `[B, L]`."""
        rows = self.rows.float()
        return torch.stack([_nearest(x, rows, 1) for x in grid])


class FeatureKNN(FeatureBaseline):
    """Nearest neighbors of whole images in feature space, see `GlobalNeighbors`."""

    kind: ClassVar[str] = "feature_knn"
    detector = GlobalNeighbors


class LocationKNN(FeatureBaseline):
    """Nearest neighbors at each location, see `LocationNeighbors`."""

    kind: ClassVar[str] = "location_knn"
    detector = LocationNeighbors


class PaDiM(FeatureBaseline):
    """One normal distribution a location, see `Gaussians`."""

    kind: ClassVar[str] = "padim"
    detector = Gaussians


class PatchCore(FeatureBaseline):
    """A coreset of normal patches wherever they lie, see `PatchBank`; the score is the largest distance."""

    kind: ClassVar[str] = "patchcore"
    detector = PatchBank
    reduce: ClassVar[str] = "max"


def greedy_coreset(patches: Tensor, count: int, seed: int) -> Tensor:
    """Return the indices of `count` patches, each the farthest from those before it: `[n, C]` to `[count]`.

    Distances are those of 32 random projections (Johnson and Lindenstrauss; the paper projects too).
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(patches.shape[1], SKETCH, generator=generator).to(patches.device) / SKETCH**0.5
    sketch = torch.cat([part.float() @ directions for part in patches.split(4096)])
    chosen = torch.zeros(count, dtype=torch.int64, device=patches.device)
    distance = torch.full((len(sketch),), torch.inf, device=patches.device)
    for i in range(1, count):
        distance = torch.minimum(distance, (sketch - sketch[chosen[i - 1]]).square().sum(1))
        chosen[i] = distance.argmax()
    return chosen


def _nearest(query: Tensor, rows: Tensor, neighbors: int) -> Tensor:
    """Return the mean distance to the nearest rows, `[..., n, C]` and `[..., N, C]` to `[..., n]`."""
    distance = torch.cdist(query, rows, compute_mode="use_mm_for_euclid_dist")
    return distance.topk(min(neighbors, distance.shape[-1]), dim=-1, largest=False).values.mean(-1)

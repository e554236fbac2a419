"""Plain baselines on pixels: what the networks must beat on the same images."""

import abc
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from simsid.data import Preprocessing, as_image_set
from simsid.distributed import ProcessGroup
from simsid.errors import CalibrationError, CheckpointError, ConfigError, InputError
from simsid.fields import from_dict, replaced
from simsid.models.base import AnomalyModel, warn_of_abnormal
from simsid.models.calibration import Calibration
from simsid.models.pixel_config import PixelConfig, PixelIsolationForestConfig, PixelKNNConfig, PixelPCAConfig


class PixelBaseline(AnomalyModel):
    """A model whose whole knowledge is a few tensors computed of the pixels of normal images.

    Args:
        config: of the class's `config_type`; None is the defaults.
        **overrides: single fields of the configuration.
    """

    config_type: ClassVar[type[PixelConfig]]
    fewest: ClassVar[int] = 1
    """Normal images that `fit` needs."""

    def __init__(self, config: Any = None, **overrides: object) -> None:
        config = self.config_type() if config is None else config
        if not isinstance(config, self.config_type):
            raise ConfigError(f"config must be a {self.config_type.__name__}, got {config!r}")
        self.config: Any = replaced(config, overrides)
        self.calibration: Calibration | None = None
        self.tensors: dict[str, Tensor] = {}
        """What was learned; empty before `fit`."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How files become the images this model takes."""
        return Preprocessing(self.config.image_size, self.config.aspect, self.config.intensity)

    @property
    def signal(self) -> str:
        """The baseline's only signal."""
        return self.kind

    @property
    def signal_names(self) -> tuple[str, ...]:
        """The baseline's only signal."""
        return (self.kind,)

    def fit(
        self,
        train: object,
        val: object = None,
        *,
        progress: bool = False,  # noqa: ARG002
        group: ProcessGroup | None = None,  # noqa: ARG002  # seconds of work, which every rank repeats
    ) -> Self:
        """Learn from normal images, then calibrate by cross-fitting; normal images of `val` set the threshold.

        An image is at distance 0 from itself, so the calibration's statistics come from `val` where it has normal
        images, and else from two halves of `train`, each measured by a model of the other.
        """
        train_set = as_image_set(train, name="train")
        warn_of_abnormal(train_set)
        if len(train_set) < self.fewest:
            raise InputError(f"{self.kind} needs at least {self.fewest} normal images, got {len(train_set)}")
        held = None
        if val is not None:
            val_set = as_image_set(val, name="val")
            normal = np.flatnonzero(val_set.labels != 1)
            held = val_set.select(normal) if len(normal) else None
        if held is not None:
            self._learn(train_set.batches())
            values = self.signals(held)
        else:
            values = {self.kind: self._cross_fitted(train_set)}
            self._learn(train_set.batches())
        self.calibration = Calibration.fit(values, values)
        return self

    def calibrate(self, images: object, holdout: object = None) -> None:
        """Measure the signal on normal images; on those held out where there are any, as `fit` says why."""
        values = self.signals(images if holdout is None else holdout)
        self.calibration = Calibration.fit(values, None if holdout is None else values)

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Return what was learned, and the configuration."""
        return self._learned(), {"config": dataclasses.asdict(self.config)}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], document: dict[str, Any], source: str, **options: object) -> Self:
        """Rebuild a baseline from `state`."""
        model = cls(from_dict(cls.config_type, document["config"]), **options)
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise CheckpointError(f"{source}: tensor {name} holds NaN or infinite values")
        model._check_tensors(tensors, source)
        model.tensors = tensors
        model._prepare()
        return model

    def _learned(self) -> dict[str, Tensor]:
        if not self.tensors:
            raise CalibrationError(f"{self.kind} is not fitted: call fit(images) with normal images first")
        return self.tensors

    @abc.abstractmethod
    def _learn(self, batches: Iterator[Tensor]) -> None:
        """Set `tensors` from normal images and call `_prepare`."""

    @abc.abstractmethod
    def _prepare(self) -> None:
        """Build what scoring needs from `tensors`."""

    @abc.abstractmethod
    def _check_tensors(self, tensors: dict[str, Tensor], source: str) -> None:
        """Raise `CheckpointError` unless names and shapes are those of a fitted model."""

    def _cross_fitted(self, images: Any) -> np.ndarray:
        """Return the signal of each image, measured by a model of the half of the images that it is not in."""
        values = np.zeros(len(images))
        halves = [np.arange(start, len(images), 2) for start in (0, 1)]
        if len(images) < 2 * self.fewest:
            halves = [np.arange(len(images))] * 2
        for own, other in (halves, halves[::-1]):
            model = type(self)(self.config)
            model._learn(images.select(other).batches())
            values[own] = model.signals(images.select(own))[self.kind]
        return values

    def _pixels(self, batches: Iterator[Tensor]) -> np.ndarray:
        """Return all images as rows `[n, pixels]`, float32."""
        return np.concatenate([batch.flatten(1).numpy().astype(np.float32) for batch in batches])


class PixelKNN(PixelBaseline):
    """Mean Euclidean distance to the k nearest normal training images, all of which the model keeps.

    score[i] = mean over the k nearest j of |image[i] - train[j]|
    """

    kind: ClassVar[str] = "pixel_knn"
    config_type: ClassVar[type[PixelConfig]] = PixelKNNConfig

    def outputs(self, images: Tensor) -> dict[str, Any]:
        """Return `pixel_knn_distance` `[B]`, float64."""
        self._learned()
        distances, _ = self._index.kneighbors(images.flatten(1).numpy())
        return {"images": images, "pixel_knn_distance": torch.from_numpy(distances.astype(np.float64).mean(axis=1))}

    def _learn(self, batches: Iterator[Tensor]) -> None:
        self.tensors = {"train": torch.from_numpy(self._pixels(batches))}
        self._prepare()

    def _prepare(self) -> None:
        from sklearn.neighbors import NearestNeighbors

        train = self.tensors["train"].numpy()
        # Search trees gain nothing in thousands of dimensions.
        self._index = NearestNeighbors(n_neighbors=min(self.config.neighbors, len(train)), algorithm="brute").fit(train)

    def _check_tensors(self, tensors: dict[str, Tensor], source: str) -> None:
        pixels = self.config.image_size**2
        if tensors.keys() != {"train"} or tensors["train"].dim() != 2 or tensors["train"].shape[1] != pixels:
            raise CheckpointError(f"{source}: the tensors must be train [n, {pixels}]")


class PixelPCA(PixelBaseline):
    """Squared error of rebuilding an image from the principal components of normal images.

    score[i] = mean over pixels of (image[i] - mean - V V^T (image[i] - mean))^2
    """

    kind: ClassVar[str] = "pixel_pca"
    config_type: ClassVar[type[PixelConfig]] = PixelPCAConfig
    fewest: ClassVar[int] = 2

    def outputs(self, images: Tensor) -> dict[str, Any]:
        """Return `pixel_pca_error` `[B, H, W]` and `rebuilt` `[B, 1, H, W]`."""
        mean, vectors = self._learned()["mean"], self.tensors["components"]
        centered = images.flatten(1) - mean
        rebuilt = (centered @ vectors.T) @ vectors
        error = (centered - rebuilt).double().square().view(images.shape[0], *images.shape[2:])
        return {
            "images": images,
            "pixel_pca_error": error,
            "rebuilt": (rebuilt + mean).view_as(images),
        }

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """Return the images rebuilt from the components, `[B, H, W]`."""
        return {"reconstruction": self.outputs(images)["rebuilt"][:, 0]}

    def _learn(self, batches: Iterator[Tensor]) -> None:
        from sklearn.decomposition import PCA

        pixels = self._pixels(batches)
        kept = min(self.config.components, len(pixels) - 1, pixels.shape[1])
        fitted = PCA(n_components=kept, svd_solver="randomized", random_state=0).fit(pixels)
        self.tensors = {
            "mean": torch.from_numpy(fitted.mean_.astype(np.float32)),
            # In the memory layout that a saved model is loaded in: in another one products are summed in another order.
            "components": torch.from_numpy(fitted.components_.astype(np.float32, order="C")),
        }
        self._prepare()

    def _prepare(self) -> None:
        """Nothing to build: scoring multiplies with `tensors` as they are."""

    def _check_tensors(self, tensors: dict[str, Tensor], source: str) -> None:
        pixels = self.config.image_size**2
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        fits = shapes.keys() == {"mean", "components"} and shapes["mean"] == (pixels,)
        if not fits or len(shapes["components"]) != 2 or shapes["components"][1] != pixels:
            raise CheckpointError(f"{source}: the tensors must be mean [{pixels}] and components [k, {pixels}]")


class PixelIsolationForest(PixelBaseline):
    """How few random splits of single pixels separate an image from normal images.

        score[i] = 2 ** -(mean over trees of (depth of the leaf + c(images in the leaf)) / c(images of a tree))

    `c(n)` is the mean depth of an unsuccessful search among n images. What is kept is the nodes of all trees in one
    list, not scikit-learn's object, which only pickle could save; the scores are those of scikit-learn.

    Source: Liu, Ting, Zhou, Isolation Forest, ICDM 2008, equations 1 and 2.
    """

    kind: ClassVar[str] = "pixel_isolation_forest"
    config_type: ClassVar[type[PixelConfig]] = PixelIsolationForestConfig
    fewest: ClassVar[int] = 2

    def outputs(self, images: Tensor) -> dict[str, Any]:
        """Return `pixel_isolation_forest` `[B]`, float64."""
        nodes, pixels = self._learned(), images.flatten(1)
        node = nodes["roots"].expand(len(images), -1)
        # A leaf is its own child.
        for _ in range(math.ceil(math.log2(self.config.sample))):
            goes_left = pixels.gather(1, nodes["pixel"][node]) <= nodes["threshold"][node]
            node = torch.where(goes_left, nodes["left"][node], nodes["right"][node])
        return {"images": images, "pixel_isolation_forest": torch.exp2(-nodes["depth"][node].mean(1))}

    def _learn(self, batches: Iterator[Tensor]) -> None:
        from sklearn.ensemble import IsolationForest

        pixels = self._pixels(batches)
        sample = min(self.config.sample, len(pixels))
        forest = IsolationForest(n_estimators=self.config.trees, max_samples=sample, random_state=self.config.seed)
        trees = [_tree_nodes(tree.tree_) for tree in forest.fit(pixels).estimators_]
        sizes = [len(tree["pixel"]) for tree in trees]
        roots = np.cumsum([0, *sizes[:-1]])
        for tree, root in zip(trees, roots):
            tree["left"], tree["right"] = tree["left"] + root, tree["right"] + root
            tree["depth"] = tree["depth"] / _mean_depth(np.array([sample]))
        self.tensors = {"roots": torch.from_numpy(roots)}
        self.tensors |= {name: torch.from_numpy(np.concatenate([tree[name] for tree in trees])) for name in trees[0]}
        self._prepare()

    def _prepare(self) -> None:
        """Nothing to build: scoring walks through `tensors` as they are."""

    def _check_tensors(self, tensors: dict[str, Tensor], source: str) -> None:
        count = len(tensors["pixel"]) if "pixel" in tensors else 0
        limits = {"roots": count, "pixel": self.config.image_size**2, "left": count, "right": count}
        fits = tensors.keys() == {*limits, "threshold", "depth"}
        for name, tensor in tensors.items():
            fits = fits and tensor.dim() == 1 and (name == "roots" or len(tensor) == count) and len(tensor) > 0
            if name in limits:
                # An index out of range would read past the list.
                fits = fits and tensor.dtype == torch.int64 and int(tensor.min()) >= 0
                fits = fits and int(tensor.max()) < limits[name]
        if not fits:
            raise CheckpointError(f"{source}: the tensors must be the nodes of trees over {limits['pixel']} pixels")


def _tree_nodes(tree: Any) -> dict[str, np.ndarray]:
    """Return the nodes of scikit-learn's tree as arrays `[nodes]`: split, children, and depth with what a leaf adds."""
    own = np.arange(tree.node_count)
    leaf = tree.children_left < 0
    left, right = np.where(leaf, own, tree.children_left), np.where(leaf, own, tree.children_right)
    depth = np.zeros(tree.node_count)
    # Children come after their parent.
    for node in own[~leaf]:
        depth[[left[node], right[node]]] = depth[node] + 1
    return {
        "pixel": np.where(leaf, 0, tree.feature),
        "threshold": tree.threshold,
        "left": left,
        "right": right,
        "depth": depth + np.where(leaf, _mean_depth(tree.n_node_samples), 0.0),
    }


def _mean_depth(count: np.ndarray) -> np.ndarray:
    """Return c(n), the mean depth of an unsuccessful search in a binary search tree of `count` images, `[m]`."""
    n = np.maximum(count, 3).astype(np.float64)
    deep = 2 * (np.log(n - 1) + np.euler_gamma) - 2 * (n - 1) / n
    return np.where(count > 2, deep, np.where(count == 2, 1.0, 0.0))

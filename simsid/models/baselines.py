"""Two plain anomaly detectors on pixels, to see what the networks are worth on the same images."""

from collections.abc import Callable
from types import MappingProxyType

import numpy as np


def knn(train: np.ndarray, test: np.ndarray, neighbours: int = 5) -> np.ndarray:
    """Score images by their mean Euclidean distance to the nearest normal training images.

        score[i] = mean over the k nearest j of |test[i] - train[j]|

    Args:
        train: `[n, pixels]` float32, normal images only.
        test: `[m, pixels]` float32. An image that is in `train` too finds itself, at distance 0.
        neighbours: k, from 1 to n.

    Returns:
        `[m]` float64, higher = more anomalous; the same for the same input.

    Raises:
        ValueError: arrays of other shapes or not finite, or `neighbours` out of range.
    """
    from sklearn.neighbors import NearestNeighbors

    train, test = _check(train, test)
    if not 1 <= neighbours <= len(train):
        raise ValueError(f"neighbours must lie between 1 and the {len(train)} training images, got {neighbours!r}")
    # Trees are no use in thousands of dimensions.
    index = NearestNeighbors(n_neighbors=neighbours, algorithm="brute").fit(train)
    distances, _ = index.kneighbors(test)
    return distances.astype(np.float64).mean(axis=1)


def pca(train: np.ndarray, test: np.ndarray, components: int = 64) -> np.ndarray:
    """Score images by the squared error of rebuilding them from the principal components of normal images.

        score[i] = mean over pixels of (test[i] - mean - V V^T (test[i] - mean))^2

    Args:
        train: `[n, pixels]` float32, normal images only, at least 2.
        test: `[m, pixels]` float32.
        components: columns of V, 1 or more; at most `min(n - 1, pixels)` are used, since n images span no more.

    Returns:
        `[m]` float64, higher = more anomalous; the same for the same input (the randomised solver has a fixed seed).

    Raises:
        ValueError: arrays of other shapes or not finite, or `components` out of range.
    """
    from sklearn.decomposition import PCA

    train, test = _check(train, test)
    if len(train) < 2:
        raise ValueError("train must hold at least 2 images for principal components, got 1")
    if components < 1:
        raise ValueError(f"components must be at least 1, got {components!r}")
    kept = min(components, len(train) - 1, train.shape[1])
    model = PCA(n_components=kept, svd_solver="randomized", random_state=0).fit(train)
    residual = test - model.inverse_transform(model.transform(test))
    return np.square(residual, dtype=np.float64).mean(axis=1)


BASELINES: MappingProxyType[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = MappingProxyType(
    {"knn": knn, "pca": pca}
)


def _check(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    train, test = np.asarray(train), np.asarray(test)
    for name, array in (("train", train), ("test", test)):
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"{name} must be [images, pixels] with one or more of each, got shape {list(array.shape)}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite, got {int((~np.isfinite(array)).sum())} NaN or infinite pixels")
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"test must have train's {train.shape[1]} pixels an image, got {test.shape[1]}")
    return train, test

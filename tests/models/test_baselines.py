import numpy as np
import pytest

from simsid.models.baselines import BASELINES, knn, pca


def some_images(seed=0, count=60):
    """Smooth 12x12 pictures: two random waves, which span few components."""
    generator = np.random.default_rng(seed)
    axis = np.linspace(0.0, np.pi, 12)
    waves = np.stack([np.outer(np.sin(axis * i), np.sin(axis * j)).ravel() for i, j in ((1, 1), (1, 2), (2, 1))])
    images = generator.normal(size=(count, 3)) @ waves * 0.3
    return (images + generator.normal(scale=0.01, size=images.shape)).astype(np.float32)


def spoiled(images):
    """A bright square in the middle of each picture."""
    images = images.copy().reshape(-1, 12, 12)
    images[:, 4:7, 4:7] += 1.5
    return images.reshape(len(images), -1)


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_obvious_anomalies_rank_highest(name):
    train, normal, abnormal = some_images(0), some_images(1, 20), spoiled(some_images(2, 20))
    options = {"components": 3} if name == "pca" else {}
    scores = BASELINES[name](train, np.concatenate([normal, abnormal]), **options)
    assert scores.shape == (40,)
    assert scores.dtype == np.float64
    assert scores[:20].max() < scores[20:].min()


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_scores_repeat_and_leave_the_input_alone(name):
    train, test = some_images(0), some_images(1, 10)
    before = train.copy(), test.copy()
    first = BASELINES[name](train, test)
    np.testing.assert_array_equal(first, BASELINES[name](train, test))
    np.testing.assert_array_equal(train, before[0])
    np.testing.assert_array_equal(test, before[1])


def test_knn_is_the_mean_distance_to_the_nearest():
    train, test = some_images(0, 15), some_images(1, 4)
    for neighbours in (1, 5, 15):
        expected = [
            np.sort([np.linalg.norm(image.astype(float) - other) for other in train])[:neighbours].mean()
            for image in test
        ]
        np.testing.assert_allclose(knn(train, test, neighbours), expected, rtol=1e-5)


def test_pca_is_what_the_components_leave_over():
    train, test = some_images(0, 30), some_images(1, 5)
    mean = train.mean(axis=0, dtype=np.float64)
    components = np.linalg.svd(train - mean, full_matrices=False)[2][:3]
    rest = (test - mean) - (test - mean) @ components.T @ components
    np.testing.assert_allclose(pca(train, test, 3), (rest**2).mean(axis=1), rtol=1e-3)


def test_pca_uses_no_more_components_than_the_images_span():
    train = some_images(0, 5)
    np.testing.assert_allclose(pca(train, train, 64), 0.0, atol=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: knn(x, x[:, :5]), "test must have train's 144 pixels an image, got 5"),
        (lambda x: knn(x[0], x), r"train must be \[images, pixels\]"),
        (lambda x: pca(x, x[:0]), r"test must be \[images, pixels\]"),
        (lambda x: pca(x, x * np.nan), "test must be finite, got 8640 NaN"),
        (lambda x: knn(x, x, 61), "neighbours must lie between 1 and the 60 training images, got 61"),
        (lambda x: knn(x, x, 0), "neighbours must lie"),
        (lambda x: pca(x, x, 0), "components must be at least 1"),
        (lambda x: pca(x[:1], x), "at least 2 images"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(some_images())

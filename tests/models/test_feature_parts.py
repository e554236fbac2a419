"""The parts of the feature memory against their definitions in a few lines each."""

import math

import numpy as np
import pytest
import torch
from tiny_features import normal
from torch.nn import functional as F

from simsid.kernels.launch import record_launches
from simsid.models import feature_jitter, feature_synthetic
from simsid.models.feature_config import FeatureConfig
from simsid.models.feature_inpainting import FeatureInpainting, _ridge, kmeans, to_grid
from simsid.models.feature_jitter import gaussian_blur, jitter
from simsid.models.feature_pooled import PooledMemory, location_weight, lung_mask, pool
from simsid.models.feature_sample import gather
from simsid.models.feature_synthetic import SyntheticClassifier, paint

STILL = torch.full((1, feature_jitter.DRAWS), 0.5)
STILL[0, 8] = 0.375  # neither blurred nor sharpened


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Location weights.


def test_lung_weight_covers_two_ellipses_and_sums_to_one():
    weight = location_weight("lungs", (7, 7))
    assert weight.sum().item() == pytest.approx(1)
    assert weight[[0, 0, 6, 6], [0, 6, 0, 6]].eq(0).all(), "corners are not lung"
    fine = location_weight("lungs", (28, 28))
    assert fine[6, 8] > 0 and fine[6, 13:15].eq(0).all(), "the mediastinum is not lung"
    # Area of two ellipses with semi-axes 42 and 80 pixels of 224.
    assert lung_mask(224, 224).float().mean().item() == pytest.approx(2 * math.pi * 42 * 80 / 224**2, rel=0.01)


@pytest.mark.parametrize("grid", [(7, 7), (4, 8), (14, 14)], ids=str)
def test_uniform_weight_gives_the_mean(grid):
    x = random(2, 3, *grid)
    torch.testing.assert_close(pool([x], "uniform")[0], x.mean((2, 3)))


def test_array_weight_is_averaged_to_the_grid():
    rows = ((1.0, 1.0, 0.0, 0.0), (1.0, 1.0, 0.0, 0.0))
    torch.testing.assert_close(location_weight(rows, (1, 2)), torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(location_weight(rows, (4, 4)), torch.tensor([[0.125, 0.125, 0, 0]] * 4))


# Pooled memory.


def test_pooled_score_is_the_mean_over_layers_of_standardized_neighbor_distances():
    clean = [random(12, 4), random(12, 6, seed=1)]
    moved = [x + 0.1 * random(*x.shape, seed=2) for x in clean]
    memory = PooledMemory([4, 6], neighbors=3)
    own = memory.fit(clean, moved)
    queries = [random(5, 4, seed=3), random(5, 6, seed=4)]
    want, want_own = np.zeros(5), np.zeros(12)
    for i in range(2):
        x, m = clean[i].double().numpy(), moved[i].double().numpy()
        mean, std = x.mean(0), x.std(0, ddof=1) + 1e-6
        change = (m - x) / std
        values, vectors = np.linalg.eigh(change.T @ change / 12)
        T = vectors / np.sqrt(values + values.mean())
        rows = [((row - mean) / std) @ T for row in (*x, *m)]

        def distance(q, skip=-1, mean=mean, std=std, T=T, rows=rows):
            q = ((q - mean) / std) @ T
            return np.mean(sorted(np.linalg.norm(q - r) for j, r in enumerate(rows) if j % 12 != skip)[:3])

        normal_distances = np.array([distance(row, skip=j) for j, row in enumerate(x)])
        mu, sigma = normal_distances.mean(), normal_distances.std(ddof=1)
        want_own += (normal_distances - mu) / sigma / 2
        want += np.array([(distance(q) - mu) / sigma / 2 for q in queries[i].double().numpy()])
    np.testing.assert_allclose(own, want_own, rtol=1e-2, atol=1e-2)  # rows are rounded to float16
    np.testing.assert_allclose(memory(queries), want, rtol=1e-2, atol=1e-2)


def test_direction_that_jittering_changes_counts_little():
    clean = random(60, 3)
    moved = clean + torch.tensor([3.0, 0.01, 0.01]) * random(60, 3, seed=1)
    memory = PooledMemory([3])
    memory.fit([clean], [moved])
    far = [torch.tensor([[6.0, 0.0, 0.0], [0.0, 6.0, 0.0]])]
    nuisance, other = memory.distances(far)[:, 0].tolist()
    assert nuisance < 0.5 * other


def test_own_rows_are_recognized_and_others_are_not():
    clean = [random(10, 8)]
    memory = PooledMemory([8])
    memory.fit(clean, [clean[0] + 0.05 * random(10, 8, seed=1)])
    query = [torch.cat([clean[0][[7, 2]], clean[0][[7]] + 0.05, random(1, 8, seed=5)])]
    assert memory.own_rows(query).tolist() == [7, 2, -1, -1]
    excluded = memory.distances([clean[0][[7]]], torch.tensor([7]))
    assert excluded > 1.5 * memory.distances([clean[0][[7]]])


def test_truncate_forgets_the_images_added_last():
    clean = [random(10, 4)]
    memory = PooledMemory([4])
    memory.fit(clean, clean)
    before = memory.rows0.clone()
    memory.add([random(9, 4, seed=1)], [random(9, 4, seed=2)])
    assert memory.images == 19 and memory.owner.max() == 18
    memory.truncate(10)
    assert torch.equal(memory.rows0, before) and memory.images == 10


# In-painting.


def inpainting(images=40, grid=3, components=4, items=6, topk=3):
    features = random(2 * images, grid * grid, 8)
    part = FeatureInpainting(8, grid, components, items, topk)
    weight = torch.full((grid * grid,), 1 / grid**2)
    return part, features, part.fit(features, images, 0.5, weight)


def test_grid_averages_every_layer_and_joins_the_channels():
    maps = [random(2, 3, 8, 8), random(2, 5, 4, 4, seed=1)]
    found = to_grid(maps, 4)
    assert found.shape == (2, 16, 8)
    torch.testing.assert_close(found[:, 0, :3], maps[0][:, :, :2, :2].mean((2, 3)))
    torch.testing.assert_close(found[:, 6, 3:], maps[1][:, :, 1, 2])


def test_look_up_is_the_softmax_over_the_nearest_items():
    part, features, _ = inpainting()
    y = part.project(features[:5])
    items = part.items.float()
    distance, index = torch.cdist(y.transpose(0, 1), items).topk(3, dim=2, largest=False)
    weight = torch.softmax(-distance.square() / 4, 2)
    want = torch.stack([(weight[i][..., None] * items[i][index[i]]).sum(1) for i in range(9)], 1)
    torch.testing.assert_close(part.look_up(y), want, rtol=1e-4, atol=1e-5)


def test_neighborhood_has_the_eight_neighbors_in_order_and_zeros_outside():
    part, _, _ = inpainting()
    x = torch.arange(1.0, 10)[None, :, None].expand(1, 9, 4)
    around = part._neighborhood(x)[0].view(9, -1)[:, [0, 4, 8, 12, 16, 20, 24, 28, 32]].tolist()
    assert around[4] == [1, 2, 3, 4, 6, 7, 8, 9, 1]  # the center: all but itself, and the 1 of the bias
    assert around[0] == [0, 0, 0, 0, 2, 0, 4, 5, 1]  # the upper left corner


def test_prediction_is_the_ridge_regression_of_each_location():
    part, features, _ = inpainting()
    y = part.project(features)
    context = part._neighborhood(part.look_up(y)).double()
    for location in (0, 4):
        A, target = context[:, location], y[:, location].double()
        penalty = 0.5 * len(A) * torch.eye(A.shape[1], dtype=torch.float64)
        penalty[-1, -1] = 0
        want = torch.linalg.solve(A.T @ A + penalty, A.T @ target)
        torch.testing.assert_close(part.prediction[location].double(), want, rtol=5e-3, atol=5e-4)


def test_ridge_regression_of_many_inputs_works_with_two_threads():
    threads, square, product = torch.get_num_threads(), torch.eye(513).repeat(8, 1, 1), random(8, 513, 4)
    torch.set_num_threads(2)
    try:
        found = _ridge((square, product, torch.tensor(2.0)), penalty=0.5)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[:, :-1], product[:, :-1] / 2)
    torch.testing.assert_close(found[:, -1], product[:, -1])  # the bias is not penalized


def test_normal_scores_are_cross_fitted():
    part, features, scores = inpainting(images=20)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5) and scores.std().item() == pytest.approx(1, rel=1e-3)
    in_sample = part.standardized(part(features[:20])[0])
    assert in_sample.mean() < -0.3, "the prediction knows the images that it was fitted to"


def test_map_is_the_error_in_units_of_normal_variance():
    part, features, _ = inpainting()
    raw, error_map = part(features[:6])
    y = part.project(features[:6])
    context = part._neighborhood(part.look_up(y))
    error = y - torch.einsum("bli,lij->blj", context, part.prediction.float())
    want = (error.square() / part.variance).mean(2).sqrt()
    torch.testing.assert_close(error_map.flatten(1), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(raw, want.mean(1), rtol=1e-4, atol=1e-5)


def test_kmeans_finds_separate_clusters_and_survives_fewer_points_than_items():
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = (centers.repeat(20, 1) + 0.1 * random(60, 2))[:, None]
    found = kmeans(points, 8, seed=0)[0]
    assert torch.cdist(centers, found).min(1).values.max() < 0.5
    assert kmeans(points[:3], 8, seed=0).isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_look_up_runs_in_the_fused_kernel_on_a_gpu():
    part, features, _ = inpainting()
    y = part.project(features[:5])
    want, part = part.look_up(y), part.cuda()
    with record_launches() as launches:
        found = part.look_up(y.cuda())
    assert launches
    torch.testing.assert_close(found.cpu(), want, rtol=1e-3, atol=1e-3)


# Jittered copies.


def test_neutral_draws_change_nothing_but_clip_the_extremes():
    images = normal(1)
    found = jitter(images, STILL)
    low, high = torch.quantile((images + 1) / 2, torch.tensor([0.01, 0.99])).tolist()
    torch.testing.assert_close(found, images.clamp(low * 2 - 1, high * 2 - 1), rtol=0, atol=1e-5)


def test_shift_moves_by_five_percent_of_the_side_and_replicates_the_border():
    image = torch.linspace(-0.5, 0.5, 40).expand(1, 1, 40, 40).clone()
    draws = STILL.clone()
    draws[0, 4] = 1.0  # two pixels to the right
    found = jitter(image, draws)
    torch.testing.assert_close(found[..., 4:38], image[..., 2:36], rtol=0, atol=1e-2)
    torch.testing.assert_close(found[..., 0], image[..., 0], rtol=0, atol=2e-2)


def test_rotation_turns_about_the_center_by_six_degrees():
    y = torch.linspace(-1, 1, 65)
    image = (0.5 * y[:, None]).expand(1, 1, 65, 65)
    draws = STILL.clone()
    draws[0, 2] = 1.0
    found = jitter(image, draws)[0, 0]
    slope = (found[32, 42] - found[32, 22]) / 20 / ((found[42, 32] - found[22, 32]) / 20)
    assert abs(slope.item()) == pytest.approx(math.tan(math.radians(6)), rel=0.02)


@pytest.mark.parametrize(("sharpness", "sharper"), [(1.0, False), (0.0, True)], ids=["blurred", "sharpened"])
def test_sharpness_draw_blurs_or_sharpens(sharpness, sharper):
    images, draws = normal(1), STILL.clone()
    draws[0, 8] = sharpness
    before, after = (F.pad(x, (0, -1)).diff(dim=3).abs().mean() for x in (jitter(images, STILL), jitter(images, draws)))
    assert (after > before) == sharper


def test_copy_does_not_depend_on_the_batch():
    images, draws = normal(5), torch.rand(5, feature_jitter.DRAWS, generator=torch.Generator().manual_seed(0))
    whole = jitter(images, draws)
    torch.testing.assert_close(jitter(images[3:4], draws[3:4]), whole[3:4])
    assert whole.min() >= -1 and whole.max() <= 1


def test_blur_of_a_point_is_a_gaussian():
    image = torch.zeros(2, 1, 33, 33)
    image[:, :, 16, 16] = 1
    found = gaussian_blur(image, torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(found.sum((1, 2, 3)), torch.ones(2))
    assert (found[0, 0, 16, 17] / found[0, 0, 16, 16]).item() == pytest.approx(math.exp(-0.5), rel=1e-3)
    assert (found[1, 0, 16, 17] / found[1, 0, 16, 16]).item() == pytest.approx(math.exp(-2), rel=1e-3)


# Painted opacities.


def test_painted_copy_is_brighter_and_brightest_in_the_lungs():
    images, mask = torch.full((16, 1, 64, 64), -0.5), lung_mask(64, 64)
    draws = torch.rand(16, feature_synthetic.DRAWS, generator=torch.Generator().manual_seed(0))
    added = (paint(images, draws, mask) - images)[:, 0]
    assert added.min() >= 0 and added.amax((1, 2)).min() > 0.1
    assert added[:, mask].mean() > 2 * added[:, ~mask].mean()


def test_classifier_separates_shifted_features_and_measures_normal_scores_out_of_sample():
    clean = [random(40, 3), random(40, 5, seed=1), random(40, 4, seed=2)]
    moved = [x + 0.1 for x in clean]
    painted = [x + 2 for x in clean]
    part = SyntheticClassifier([3, 5, 4])
    scores = part.fit(clean, moved, painted)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5) and len(part.coefficients) == 9
    assert part.standardized(part(painted)).min() > part.standardized(part(clean)).max()


# The sample.


def pixel_mean(images):
    return [images.mean((2, 3))], images.flatten(2).transpose(1, 2)


def test_sample_holds_images_first_and_copies_after_in_the_same_order(monkeypatch):
    monkeypatch.setattr(feature_synthetic, "paint", lambda images, draws, mask: torch.ones_like(images))
    images = normal(30)
    config = FeatureConfig(image_size=32, most_images=30, weight="uniform")
    sample = gather([images[:14], images[14:]], pixel_mean, config, ("jittered", "painted"))
    torch.testing.assert_close(sample.clean[0], images.mean((2, 3)))
    assert (sample.count, sample.seen, len(sample.grid), sample.grid.dtype) == (30, 30, 60, torch.float16)
    torch.testing.assert_close(sample.grid[:30, :, 0].float(), images.flatten(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sample.grid[30:].float().mean(1), sample.jittered[0], rtol=1e-2, atol=1e-2)
    assert sample.painted[0].tolist() == [[1.0]] * 30


def test_every_image_of_a_long_stream_has_the_same_chance():
    images = torch.arange(40.0).view(40, 1, 1, 1).expand(-1, 1, 8, 8) / 40
    counts = torch.zeros(40)
    for seed in range(10):
        config = FeatureConfig(image_size=32, most_images=8, weight="uniform", seed=seed)
        sample = gather(images.split(25), lambda x: ([x[:, :, 0, 0]], x[:, :, 0]), config)
        assert (sample.count, sample.seen) == (8, 40)
        counts[(sample.clean[0][:, 0] * 40).round().long()] += 1
    # 40 expected in each half of the stream, with a deviation of 4.
    assert 28 < counts[:20].sum() < 52
    assert (counts > 0).sum() > 25, "the chosen images must differ from seed to seed"

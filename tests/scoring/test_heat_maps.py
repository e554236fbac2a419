"""Heat maps: they point at planted anomalies, depend on the weights, and come back to the image's own size."""

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.nn import functional as F

from simsid import Model
from simsid.data import Preprocessing, read_image
from simsid.data.reading import DecodedImage
from simsid.errors import InputError
from simsid.models import MAPS, PixelKNN, PixelPCA
from simsid.models.discriminator import Discriminator
from simsid.scoring import explain_files
from simsid.scoring.heat_maps import file_name
from simsid.scoring.overlay import overlay, upper_limit, with_color_bar

SIDE = 8
"""Height and width of a planted anomaly."""


def smooth(count, seed):
    """Images `[count, 1, 48, 48]` of low frequencies only, which an autoencoder learns at once."""
    low = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * 1.2 - 0.6
    return F.interpolate(low, size=(48, 48), mode="bicubic", align_corners=True)


def planted(count, seed):
    """Return smooth images with a square that is too bright or too dark, and its corner in each."""
    images = smooth(count, seed)
    corners = torch.randint(2, 48 - SIDE - 2, (count, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    for image, (row, column) in zip(images[:, 0], corners):
        square = image[row : row + SIDE, column : column + SIDE]
        square += -0.8 if square.mean() > 0 else 0.8
    return images.clamp(-1, 1), corners


def hit_rate(maps, corners):
    """Return the fraction of maps whose peak lies in the square (the pointing game)."""
    peaks = [divmod(int(heat.argmax()), heat.shape[1]) for heat in maps]
    hits = [r <= i < r + SIDE and c <= j < c + SIDE for (i, j), (r, c) in zip(peaks, corners)]
    return sum(hits) / len(hits)


def train(network, steps):
    """Train a network to reconstruct smooth images."""
    optimizer = torch.optim.Adam(network.parameters(), 6e-3)
    for step in range(steps):
        images = smooth(8, 1000 + step)
        loss = (network.train()(images).student - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def autoencoder():
    """A network without memories after 60 short steps on smooth images."""
    return train(tiny.model(levels=3, inpainting="none", decoder_memories=0, skip_levels=0, distillation=False), 60)


@pytest.mark.parametrize("name", ["residual", "local_residual", "focal_residual"])
def test_residual_map_of_trained_network_peaks_on_planted_anomaly(autoencoder, name):
    images, corners = planted(48, 7)
    assert hit_rate(autoencoder.maps(images, name), corners) > 0.8


def test_standardized_residual_map_of_calibrated_network_peaks_on_planted_anomaly(autoencoder):
    images, corners = planted(48, 7)
    autoencoder.calibrate(smooth(8, 1), smooth(60, 2))
    rate = hit_rate(autoencoder.maps(images, "standardized_residual"), corners)
    print(f"standardized_residual: peak in the anomaly in {rate:.0%} of {len(corners)} images")
    assert rate > 0.8


def test_residual_map_peaks_elsewhere_without_anomaly(autoencoder):
    _, corners = planted(48, 7)
    assert hit_rate(autoencoder.maps(smooth(48, 7), "residual"), corners) < 0.3


def test_pixel_pca_map_peaks_on_planted_anomaly():
    images, corners = planted(48, 9)
    model = PixelPCA(image_size=48, components=16).fit(smooth(100, 3))
    assert hit_rate(model.maps(images, "pixel_pca"), corners) > 0.8


def patch_hit_rate(maps, corners, side):
    """Return the fraction of maps whose peak lies in a patch of `side` pixels that the square reaches into."""
    hits = 0
    for heat, corner in zip(maps, corners):
        peak = divmod(int(heat.argmax()), heat.shape[1])
        hits += all(
            start < n // side * side + side and n // side * side < start + SIDE for n, start in zip(peak, corner)
        )
    return hits / len(corners)


@pytest.fixture(scope="module")
def with_memories():
    """A network with all memories and 3 x 3 patches after 60 short steps on smooth images."""
    network = tiny.model(patches=3, items=24, decoder_items=24, topk=3, distillation=False)
    return train(network, 60)


@pytest.mark.parametrize("name", [name for name in tiny.model().map_names if not MAPS[name].localizes])
def test_peak_of_a_map_of_features_is_not_said_to_lie_on_the_anomaly(with_memories, name):
    """`pytest -s` prints the hit rates that docs/explain.md states; a map that gets above 0.8 should claim it."""
    images, corners = planted(48, 7)
    rate = patch_hit_rate(with_memories.maps(images, name), corners, side=16)
    print(f"{name}: peak in a patch of the anomaly in {rate:.0%} of {len(corners)} images")
    assert rate < 0.8


def remember(memory, query):
    """Make one location's query the only item of that location."""
    memory.items.copy_(query.expand_as(memory.items))


@pytest.mark.parametrize("decoder_memory", ["patch", "subpatch"])
@pytest.mark.parametrize("name", ["memory_distance", "decoder_memory_1", "decoder_memory_2"])
def test_map_of_a_memory_peaks_in_the_patch_that_the_memory_lacks(name, decoder_memory):
    # In the decoder nothing may cross a patch's border, or the neighbors of a changed patch would change too.
    alone = {} if name == "memory_distance" else {"inpainting": "none", "merge_levels": 0}
    model = tiny.model(decoder_memory=decoder_memory, **alone).eval()
    # Equal patches, since sub-windows share their items between patches.
    normal = tiny.images(1)[..., :24, :24].repeat(1, 1, 2, 2)
    blocks = {"memory_distance": model.student.inpainting, "decoder_memory_1": model.student.memories[0]}
    memory = blocks.get(name, model.student.memories[1]).memory
    with torch.no_grad():
        hook = memory.register_forward_pre_hook(lambda _, inputs: remember(memory, inputs[0][0, :, None]))
        model(normal)
        hook.remove()
    for location, (row, column) in enumerate(((0, 0), (0, 24), (24, 0), (24, 24))):
        changed = normal.clone()
        changed[..., row : row + 24, column : column + 24] *= -1
        (heat,) = model.maps(changed, name)
        peak = divmod(int(heat.argmax()), 48)
        assert (peak[0] // 24, peak[1] // 24) == divmod(location, 2)
        assert heat.max() > 100 * model.maps(normal, name).max()


def bright_spot_detector():
    """A discriminator whose channel 0 carries brightness to every 32nd pixel, and which calls bright abnormal."""
    network = Discriminator(96).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        for convolution in network.convolutions:
            convolution.weight[0, 0, 2, 2] = 1.0
        for norm in network.norms:
            norm.weight.fill_(1.0)
        network.output.weight[0, :9] = -1.0
    return network


@pytest.mark.parametrize("statistics", ["module", "per_image"])
@pytest.mark.parametrize("cell", [(0, 0), (0, 2), (1, 1), (2, 1)], ids=str)
def test_grad_cam_peaks_where_features_raise_the_score(statistics, cell):
    network = bright_spot_detector()
    images = torch.zeros(2, 1, 96, 96)
    top, left = 32 * cell[0], 32 * cell[1]
    images[1, 0, max(top - 8, 0) : top + 8, max(left - 8, 0) : left + 8] = 1.0
    heat = network.grad_cam(images, statistics)
    assert heat.shape == (2, 3, 3) and not heat.requires_grad and heat.dtype == torch.float32
    assert divmod(int(heat[1].argmax()), 3) == cell
    assert heat[0].sum() < 1e-6 < heat[1].max()
    if statistics == "module":
        assert network(images)[1] < network(images)[0], "the spot raises the score, the negated logit"
    with torch.no_grad():
        network.output.weight.neg_()
    assert network.grad_cam(images, statistics)[1][cell] == 0, "evidence against an anomaly is not shown"


def test_grad_cam_matches_its_definition():
    torch.manual_seed(0)
    network, images = Discriminator(96).eval(), torch.randn(2, 1, 96, 96)
    with torch.no_grad():
        features = network.features(images, "per_image")
        weights = -network.output.weight.view(256, 3, 3).mean((1, 2))
    expected = torch.einsum("k,bkhw->bhw", weights, features).relu()
    torch.testing.assert_close(network.grad_cam(images, "per_image"), expected)
    torch.testing.assert_close(
        network(images, "per_image"), features.flatten(1) @ network.output.weight[0] + network.output.bias
    )


def test_grad_cam_works_in_inference_mode_and_leaves_gradients_alone():
    model, images = tiny.model(), tiny.images(2)
    expected = model.maps(images, "discriminator_per_image")
    with torch.inference_mode():
        found = model.maps(images, "discriminator_per_image")
        frozen = model.freeze().maps(images, "discriminator_per_image")
    assert torch.equal(found, expected) and torch.equal(frozen, expected) and expected.shape == (2, 48, 48)
    assert not expected.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def random_model(seed):
    """A tiny network whose norms, too, are random: with fresh ones Grad-CAM may be zero everywhere."""
    model = tiny.model(seed)
    for norm in model.discriminator.norms:
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
        torch.nn.init.normal_(norm.bias, 0.5, 0.3)
    return model


@pytest.mark.parametrize("name", tiny.model().map_names)
def test_map_changes_with_random_weights(name):
    """A map that stayed would show the image, and not the model."""
    images = tiny.images(4)
    one, other = (random_model(seed).maps(images, name) for seed in (2, 4))
    assert torch.equal(one, random_model(2).maps(images, name))
    assert (one - other).norm() > 0.02 * one.norm() > 0
    # Beyond a common factor and offset, too.
    one, other = (heat.flatten(1) - heat.flatten(1).mean(1, keepdim=True) for heat in (one, other))
    assert F.cosine_similarity(one, other).max() < 0.999


def test_residual_map_of_trained_network_differs_from_untrained(autoencoder):
    images, corners = planted(48, 7)
    torch.manual_seed(3)
    untrained = Model(autoencoder.config)
    assert hit_rate(untrained.maps(images, "residual"), corners) < 0.6


def test_choice_of_map_falls_back_to_the_first_and_errors_list_the_choices():
    model = tiny.model(signal="residual")
    assert model.choose_map() == "residual" and model.choose_map("memory_distance") == "memory_distance"
    assert tiny.model().choose_map() == "standardized_residual"
    with pytest.raises(InputError, match=r"signal must be one of discriminator_per_image, .*, got 'nonsense'"):
        model.choose_map("nonsense")
    with pytest.raises(InputError, match="none of the model's signals has a map: pixel_knn"):
        PixelKNN(image_size=48).choose_map()
    assert all(MAPS[name].unit for name in model.map_names)


SHAPES = [(48, 48), (96, 72), (60, 130), (400, 90), (20, 33), (7, 300)]


@pytest.mark.parametrize("aspect", ["stretch", "pad", "crop"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_map_comes_back_to_where_the_image_was(aspect, shape):
    """A ramp across the image, taken through the preprocessing and back, is the ramp again."""
    rows, columns = shape
    for axis, length in ((0, rows), (1, columns)):
        ramp = np.broadcast_to(np.expand_dims(np.linspace(0, 65535, length), 1 - axis), shape).astype(np.uint16)
        preprocessing = Preprocessing((48, 40), aspect, "range")
        seen = preprocessing.quantize(DecodedImage(ramp, (0.0, 65535.0), for_display=False, bits=16, format=""))
        back = preprocessing.at_own_size(seen / 65535.0, shape)
        assert back.shape == shape and back.dtype == np.float32
        covered = ~np.isnan(back)
        assert covered.all() or aspect == "crop"
        # Interpolation is constant beyond the outermost pixel centers, in steps of the coarser grid; "pad" shrinks
        # the image to the fewest pixels.
        step = (
            1.0
            / min(seen.shape[axis], length)
            * max(1.0, max(rows / columns, columns / rows) if aspect == "pad" else 1)
        )
        assert np.abs(back - ramp / 65535.0)[covered].max() < 1.2 * step + 1e-3


def test_crop_leaves_nan_where_the_model_saw_nothing():
    back = Preprocessing(48, "crop").at_own_size(np.ones((48, 48)), (100, 60))
    assert np.isnan(back[:20]).all() and np.isnan(back[80:]).all() and (back[20:80] == 1).all()


def test_pad_drops_what_lies_on_the_bars():
    values = np.zeros((48, 48))
    values[:, :8] = 9.0
    values[20, 30] = 1.0
    back = Preprocessing(48, "pad").at_own_size(values, (96, 48))
    assert back.shape == (96, 48) and 0.3 < back.max() <= 1.0
    with pytest.raises(InputError, match=r"values must have shape \[48, 48\], got \[47, 48\]"):
        Preprocessing(48).at_own_size(values[1:], (96, 48))


def test_gray_shows_the_values_that_the_model_sees(tmp_path):
    path = tiny.film(tmp_path / "a.png")
    image = read_image(path)
    preprocessing = Preprocessing((40, 52))
    assert np.array_equal(preprocessing.gray(image), preprocessing.quantize(image))


def test_overlay_in_bands_equals_overlay_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    image, heat = rng.integers(0, 256, (50, 30), dtype=np.uint8), rng.random((50, 30))
    heat[3, 4] = np.nan
    whole = overlay(image, heat, 0.8)
    monkeypatch.setattr("simsid.scoring.overlay.BAND_PIXELS", 90)
    assert np.array_equal(overlay(image, heat, 0.8), whole)
    # Images of the model are floats in -1..1.
    assert np.abs(overlay(image / 127.5 - 1, heat, 0.8).astype(int) - whole).max() == 0


def test_color_bar_leaves_the_picture_as_it_is_and_shows_the_scale():
    picture = np.full((40, 900, 3), 77, np.uint8)
    drawn = with_color_bar(picture, 0.25, "residual: squared difference")
    assert drawn.shape[1] == 900 and np.array_equal(drawn[:40], picture)
    bar = drawn[40:].reshape(-1, 3)
    assert (bar == (252, 254, 164)).all(1).any(), "the brightest color"
    assert (bar == 255).all(1).any(), "white text"
    narrow = with_color_bar(picture[:, :20], 0.25, "residual: squared difference")
    assert narrow.shape[1] > 100 and np.array_equal(narrow[:40, :20], picture[:, :20])


def test_limit_ignores_values_that_are_not_finite():
    assert upper_limit(np.array([0.0, 1.0, np.nan, np.inf])) == pytest.approx(0.995)
    assert upper_limit(np.zeros(3)) == upper_limit(np.full(2, np.nan)) == 1.0


def test_files_are_explained_in_order_in_more_than_one_batch(tmp_path):
    model, out = tiny.model(signal="residual"), tmp_path / "out"
    out.mkdir()
    paths = [str(path) for path in tiny.films(tmp_path / "in", 20)]
    paths.insert(5, str(tmp_path / "missing.png"))
    found = list(explain_files(model, paths, out, workers=2))
    assert [row.path for row in found] == paths
    assert [row.path for row in found if row.reason] == [paths[5]] and not found[5].overlay
    for row in found[:5] + found[6:]:
        heat = np.load(out / row.map)
        assert heat.dtype == np.float32 and heat.shape == (row.height, row.width) == (40, 52)
        assert heat[row.peak_row, row.peak_column] == heat.max() == np.float32(row.peak)
        with Image.open(out / row.overlay) as picture:
            assert picture.size[0] >= 52 and picture.size[1] > 40
    assert len(list(out.iterdir())) == 40
    # The same map as in memory.
    (image,) = read_one(paths[0], model)
    (expected,) = model.maps(image[None], "residual").numpy()
    assert np.array_equal(np.load(out / found[0].map), model.preprocessing.at_own_size(expected, (40, 52)))


def read_one(path, model):
    from simsid.data import read

    return read(path, model)


def test_names_are_safe_and_differ_for_files_of_one_name():
    names = [file_name(path) for path in ("/a/scan.png", "/b/scan.png", "/a/scan.jpg", "/a/../../é?.png", "/x/\udcff")]
    assert len(set(names)) == 5 and names[0].startswith("scan-")
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names)


def test_map_that_is_not_finite_is_a_reason_and_no_file(tmp_path):
    model = tiny.model(signal="residual")
    with torch.no_grad():
        model.student.output.bias.fill_(float("nan"))
    (row,) = explain_files(model, [tiny.film(tmp_path / "in" / "a.png")], tmp_path)
    assert row.reason == "the map of residual holds NaN or infinite values"
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_limit_that_is_not_positive_is_an_error_at_the_call(tmp_path, limit):
    with pytest.raises(InputError, match="limit must be a positive number"):
        explain_files(tiny.model(), [], tmp_path, limit=limit)

"""The feature memory as a model: fitting, scoring, saving, adapting to a site, and what is refused."""

import json
import pathlib
import weakref

import numpy as np
import pytest
import torch
from shared import ZHANGLAB, needs_zhanglab
from tiny_features import TinyEncoder, abnormal, auc, memory, normal, shifted

import simsid
from simsid import FeatureMemory
from simsid.data import ImageSet, Record, ZhangLab, load_images
from simsid.errors import CheckpointError, InputError, InputTypeError
from simsid.models.feature_encoder import SHA256

NAMES = ("pooled_memory", "inpainting", "combined")


@pytest.fixture(scope="module")
def fitted():
    return memory().fit(normal(40), normal(20, 5))


@pytest.fixture
def saved(fitted, tmp_path):
    fitted.save(tmp_path)
    return tmp_path


def load(folder):
    return simsid.load(folder, encoder=TinyEncoder())


def change(folder, **values):
    """Replace entries of model.json."""
    document = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**document, **values}))


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_abnormal_images_score_higher_by_every_signal(fitted):
    assert fitted.signal_names == NAMES and fitted.signal == "combined"
    low, high = fitted.signals(normal(20, 2)), fitted.signals(abnormal(20))
    assert all(auc(low[name], high[name]) > 0.95 for name in NAMES)
    assert fitted.score(abnormal(4)).min() > 0.9


def test_signals_are_in_units_of_normal_images(fitted):
    mean, std = fitted.calibration.mean, fitted.calibration.std
    assert [mean[name] for name in NAMES] == pytest.approx([0, 0, 0], abs=1e-5)
    assert std["inpainting"] == pytest.approx(1, rel=0.05)
    assert fitted.calibration.count == 40 and len(fitted.calibration.holdout["combined"]) == 20
    fresh = fitted.signals(normal(40, 7))
    assert all(abs(fresh[name].mean()) < 0.8 for name in NAMES), "unseen normal images must score like training images"


def test_pooled_memory_compares_the_deepest_layers_and_the_inpainting_all():
    model = memory(pooled_layers=1).fit(normal(12))
    assert model.parts.pooled.channels == (8,) and len(model.parts.inpainting.mean) == 14
    both = memory(pooled_layers=5).fit(normal(12))
    assert both.parts.pooled.channels == (6, 8)
    images = abnormal(3)
    assert np.array_equal(model.signals(images)["inpainting"], both.signals(images)["inpainting"])


def test_combined_signal_is_the_weighted_sum():
    model = memory(synthetic=True, inpainting_weight=0.3, synthetic_weight=0.2).fit(normal(20))
    found = model.signals(normal(5, 2))
    assert found.keys() == {"pooled_memory", "inpainting", "synthetic", "combined"}
    want = found["pooled_memory"] + 0.3 * found["inpainting"] + 0.2 * found["synthetic"]
    np.testing.assert_allclose(found["combined"], want, rtol=1e-12)


def test_map_is_highest_where_the_anomaly_is(fitted):
    assert fitted.map_names == ("inpainting", "combined")
    images = abnormal(8)
    found = fitted.maps(images, "combined")
    assert found.shape == (8, 32, 32) and torch.equal(found, fitted.maps(images, "inpainting"))
    assert (found[:, :16, :16].mean((1, 2)) > 1.5 * found[:, 16:, 16:].mean((1, 2))).all()


def test_scores_do_not_depend_on_the_other_images_bit_for_bit(fitted):
    images = torch.cat([normal(21, 3), abnormal(2)])
    whole = fitted.signals(images)
    assert equal(fitted.signals(images[5:]), {name: values[5:] for name, values in whole.items()})
    assert equal(fitted.signals(images.flip(0)), {name: values[::-1] for name, values in whole.items()})


def test_fit_is_repeatable_whatever_batches_the_images_come_in(fitted):
    assert memory().fit(iter(normal(40).split(7)), normal(20, 5)).identity() == fitted.identity()
    assert memory(seed=1).fit(normal(40), normal(20, 5)).identity() != fitted.identity()


def test_stream_longer_than_the_limit_is_read_once_and_kept_in_bounded_memory():
    encoded = []
    model = memory(most_images=16, items=3)
    model.encoder.network.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    alive = []

    def batches():
        for seed in range(40):
            batch = normal(10, seed)
            alive.append(weakref.ref(batch))
            yield batch

    sources = batches()
    model.encoder.network.register_forward_pre_hook(
        lambda *_: held.append(sum(reference() is not None for reference in alive))
    )
    held = []
    model.fit(sources)
    assert max(held) <= 3, "images are held only while they are encoded"
    assert model.parts.pooled.images == 16 and model.calibration.count == 16
    # 16 (1 + ln(400 / 16)) = 67 images expected, clean and jittered, where all would be 800 passes.
    assert 2 * 16 < sum(encoded) < 2 * 110
    assert next(sources, None) is None


def test_calibrate_judges_training_images_without_their_own_rows(fitted, saved):
    model, images = load(saved), normal(40)
    naive = model.signals(images)["pooled_memory"].mean()
    model.calibrate(images, normal(10, 9))
    assert model.calibration.mean["pooled_memory"] == pytest.approx(0, abs=1e-2)
    assert naive < -0.3, "a memory that holds the image finds it too normal"
    assert len(model.calibration.holdout["inpainting"]) == 10


def test_abnormal_images_of_val_are_left_out_of_the_thresholds():
    pixels = ((torch.cat([normal(6, 3), abnormal(4)]) + 1) * 127.5).round().to(torch.uint8)
    val = ImageSet(pixels, tuple(Record(f"{i}.png", label=int(i >= 6)) for i in range(10)))
    assert len(memory().fit(normal(12), val).calibration.holdout["combined"]) == 6


def test_synthetic_classifier_finds_opacities():
    model = memory(synthetic=True).fit(normal(40))
    low, high = model.signals(normal(20, 2)), model.signals(abnormal(20))
    assert auc(low["synthetic"], high["synthetic"]) > 0.9


def test_location_weight_is_configured_and_saved(tmp_path):
    weight = np.zeros((4, 4))
    weight[2:, 2:] = 1.0  # the anomaly lies in the opposite corner
    model = memory(weight=weight).fit(normal(40))
    assert (
        model.signals(abnormal(10))["inpainting"].mean()
        < memory().fit(normal(40)).signals(abnormal(10))["inpainting"].mean()
    )
    model.save(tmp_path)
    assert load(tmp_path).config == model.config
    assert load(tmp_path).config.weight[3] == (0.0, 0.0, 1.0, 1.0)


# Saving and loading.


def test_loaded_model_scores_bit_for_bit_as_saved(fitted, saved):
    model, images = load(saved), abnormal(5)
    assert isinstance(model, FeatureMemory) and model.config == fitted.config
    assert equal(model.signals(images), fitted.signals(images))
    assert torch.equal(model.score(images), fitted.score(images))
    assert model.identity() == fitted.identity()
    assert model.preprocessing == fitted.preprocessing


def test_shipped_encoder_needs_nothing_at_loading(tmp_path):
    model = FeatureMemory(image_size=64, components=8, items=4, grid=2).fit(torch.rand(8, 1, 64, 64) * 2 - 1)
    model.save(tmp_path)
    document = json.loads((tmp_path / "model.json").read_text())
    assert document["encoder"] == {"foreign": False, "network": "efficientnet_lite0", "sha256": SHA256}
    images = torch.rand(2, 1, 64, 64) * 2 - 1
    assert equal(simsid.load(tmp_path).signals(images), model.signals(images))
    # The encoder's 9.6 MB are not saved again.
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2_000_000


def test_foreign_encoder_must_be_given_again(saved):
    with pytest.raises(CheckpointError, match=r"features of tiny_features\.TinyEncoder.*load it with encoder=module"):
        simsid.load(saved)
    with pytest.raises(CheckpointError, match="with other weights"):
        simsid.load(saved, encoder=TinyEncoder(seed=1))
    with pytest.raises(InputTypeError, match="must be a torch"):
        simsid.load(saved, encoder="resnet18")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("images", 39, "must have shape"),
        ("images", 1 << 40, "whole numbers in 1 to"),
        ("images", True, "whole numbers"),
        ("channels", [6, 9], "must have shape"),
        ("grid_channels", 13, "must have shape"),
        ("grid_channels", None, "whole numbers"),
        ("channels", [6], "lacks|has the unknown"),
        ("channels", "many", "whole numbers"),
        ("config", {"grid": 10**6}, "grid must be in 2 to 32"),
        ("config", {"depth": 3}, "is not a configuration field"),
        ("encoder", None, "encoder must hold"),
        ("original", {"images": 3}, "original must hold"),
        ("original", {"images": 3, "units": {}, "calibration": None}, "units must be"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_document_that_does_not_fit_is_a_checkpoint_error(saved, name, value, message):
    change(saved, **{name: value})
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def test_missing_entry_is_a_checkpoint_error(saved):
    document = json.loads((saved / "model.json").read_text())
    del document["encoder"]
    (saved / "model.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="has no 'encoder'"):
        load(saved)


def test_shipped_model_is_opened_by_name_and_a_folder_by_path(tmp_path, monkeypatch):
    assert simsid.models.shipped_models() == ("zhanglab",)
    model = simsid.load("zhanglab")
    assert isinstance(model, FeatureMemory) and model.calibration.count == 1241
    assert len(model.calibration.holdout["combined"]) == 100
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"^zhanglab/model\.json does not exist$"):
        simsid.load(pathlib.Path("zhanglab"))
    with pytest.raises(
        CheckpointError, match=r"adults/model\.json does not exist, and the shipped models are zhanglab"
    ):
        simsid.load("adults")


@needs_zhanglab
def test_shipped_model_scores_validation_films_as_its_card_says():
    """The thresholds are those of the card; every twentieth film keeps the test short."""
    model = simsid.load("zhanglab")
    records = [record for record in ZhangLab(ZHANGLAB).records if record.split == "val"][::20]
    films = load_images(records, 224, workers=1)
    scores = model.signals(films)["combined"]
    low, high = scores[films.labels == 0], scores[films.labels == 1]
    assert auc(low, high) > 0.9
    # These normal films are among those that set the threshold, so the values must be found there.
    held = np.asarray(model.calibration.holdout["combined"])
    assert np.abs(low[:, None] - held).min(1).max() < 1e-3


# Adapting to a site.


def test_adapting_moves_scores_and_thresholds_to_the_site(saved):
    model, site = load(saved), shifted(normal(24, 11))
    fresh, sick = shifted(normal(40, 12)), shifted(abnormal(20, 13))

    def flagged():
        return (model.signals(fresh)["combined"] > model.calibration.threshold("combined", 0.1)).mean()

    assert flagged() > 0.9, "without local images the threshold flags nearly every normal image"
    done = model.adapt(site)
    assert (done.added, done.known, done.fitted) == (24, 0, 40)
    assert flagged() < 0.3
    assert auc(model.signals(fresh)["combined"], model.signals(sick)["combined"]) > 0.9
    assert model.calibration.count == 24 and model.parts.pooled.images == 64


def test_adapting_judges_each_image_without_its_own_rows(saved):
    model, site = load(saved), shifted(normal(24, 11))
    model.adapt(site)
    assert model.calibration.mean["pooled_memory"] == pytest.approx(0, abs=1e-5)
    assert model.signals(site)["pooled_memory"].mean() < -0.3


def test_calibrating_on_images_of_the_memory_judges_each_without_its_own_rows(saved):
    """Otherwise adapting to images and then calibrating on them sets a threshold that new images exceed."""
    model, site = load(saved), shifted(normal(24, 11))
    model.adapt(site)
    model.calibrate(site, site)
    held = np.array(model.calibration.holdout["pooled_memory"])
    assert held.mean() == pytest.approx(model.calibration.mean["pooled_memory"], abs=1e-6)
    assert model.signals(site)["pooled_memory"].mean() < held.mean() - 0.3


def test_revert_restores_the_fitted_model_bit_for_bit_also_after_saving(saved, tmp_path):
    model = load(saved)
    before = model.identity()
    model.adapt(shifted(normal(9, 11)))
    model.adapt(shifted(normal(9, 12)))
    model.save(tmp_path / "adapted")
    again = load(tmp_path / "adapted")
    assert again.identity() == model.identity() != before
    for adapted in (model, again):
        adapted.revert()
        assert adapted.identity() == before
        with pytest.raises(InputError, match="not adapted"):
            adapted.revert()


def test_abnormal_images_among_the_local_ones_are_named(saved):
    pixels = ((shifted(torch.cat([normal(20, 11), abnormal(2)])) + 1) * 127.5).round().to(torch.uint8)
    local = ImageSet(pixels, tuple(Record(f"{i}.png") for i in range(22)))
    names = [name for name, _ in load(saved).adapt(local).abnormal]
    assert set(names[:2]) == {"20.png", "21.png"}
    assert {name for name, _ in load(saved).adapt(local.batch(slice(0, 22))).abnormal} >= {"20", "21"}


def test_images_that_the_memory_holds_are_not_added_again(saved):
    model = load(saved)
    done = model.adapt(torch.cat([normal(40), shifted(normal(10, 3))]))
    assert (done.added, done.known) == (10, 40)
    with pytest.raises(
        InputError, match="at least 8 images that the memory lacks, got 0 of 40, as it holds the others"
    ):
        model.adapt(normal(40))


# What is refused.


def test_model_that_is_not_fitted_says_so(tmp_path):
    images = normal(9)
    for action in (memory().signals, memory().calibrate, memory().adapt, memory().save):
        with pytest.raises(InputError, match=r"empty: call fit\(images\)"):
            action(tmp_path if action.__name__ == "save" else images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (normal(7), "at least 8 normal images, got 7"),
        (iter([]), "at least 8 normal images, got 0"),
        (torch.zeros(8, 1, 32, 40), r"must have shape \[B, 1, 32, 32\]"),
    ],
    ids=["too few", "empty stream", "other size"],
)
def test_fit_refuses_unusable_images(images, message):
    with pytest.raises(InputError, match=message):
        memory().fit(images)


# Real radiographs, and a GPU.


@needs_zhanglab
def test_sixteen_real_films_are_enough_to_separate_pneumonia():
    records = ZhangLab(ZHANGLAB).records
    wanted = {("train", 0): 16, ("val", 0): 8, ("val", 1): 8}
    train, low, high = (
        load_images([record for record in records if (record.split, record.label) == key][:count], 224, workers=1)
        for key, count in wanted.items()
    )
    model = FeatureMemory().fit(train)
    low, high = model.signals(low), model.signals(high)
    assert all(auc(low[name], high[name]) > 0.9 for name in NAMES)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_scores_as_the_cpu_does_and_looks_up_with_the_fused_kernel(fitted, saved):
    from simsid.kernels.launch import record_launches

    images = torch.cat([normal(8, 3), abnormal(8)])
    want = fitted.signals(images)
    model = simsid.load(saved, encoder=TinyEncoder(), device="cuda")
    with record_launches() as launches:
        found = model.signals(images)
    assert launches
    for name in NAMES:
        np.testing.assert_allclose(found[name], want[name], rtol=1e-2, atol=1e-2)
    fresh = memory().to_device("cuda").fit(normal(40))
    assert auc(fresh.signals(normal(20, 2))["combined"], fresh.signals(abnormal(20))["combined"]) > 0.95

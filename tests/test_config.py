"""Configurations: presets, ablations, and one sentence for everything that cannot be built."""

import copy
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import tiny

from simsid.config import ABLATIONS, PRESETS, Config, TrainingConfig
from simsid.errors import ConfigError


def test_presets_are_the_papers():
    simsid, squid, digits = Config.simsid(), Config.squid(), Config.digit_anatomy()
    assert (simsid.image_size, simsid.patches, simsid.items, simsid.topk, simsid.width) == (128, 4, 100, 5, 32)
    assert (simsid.levels, simsid.skip_levels, simsid.merge_levels, simsid.decoder_memories) == (4, 2, 2, 2)
    assert (simsid.threshold, simsid.border, simsid.memory, simsid.rho) == ("inclusive", "zero", "matrix", 1.0)
    assert (simsid.decoder_memory, simsid.heads, simsid.dropout) == ("patch", 8, 0.0)
    assert not simsid.gumbel_noise and simsid.temperature == 1.0 and simsid.signal == "standardized_residual"
    assert simsid == Config()
    assert (squid.patches, squid.items, squid.decoder_items, squid.memory, squid.rho) == (2, 200, 200, "queue", 0.95)
    assert (digits.image_size, digits.patches, digits.levels, digits.signal) == (96, 3, 3, "focal_residual")
    assert not Config.memae().space_aware and Config.memae().shrinkage == "hard"
    assert Config.autoencoder().inpainting == "none" and Config.autoencoder().decoder_memories == 0
    assert Config.vae() == Config.autoencoder(variational=True) and not Config.vae().adversarial


def test_sizes():
    config = Config()
    assert (config.locations, config.patch_size, config.deepest_channels) == (16, 32, 512)
    assert config.channels == (32, 64, 128, 256, 512)
    assert config.bottleneck_features == 128 * 2 * 2
    assert Config(levels=3).deepest_channels == 8 * 32
    assert Config(levels=5).channels[-2:] == (512, 512), "a fifth level does not widen"


def test_ablations_change_one_thing():
    assert set(ABLATIONS) == {
        *("no_space_aware", "no_skip", "no_inpainting", "no_hierarchical_memory", "no_distillation"),
        *("no_stop_gradient", "no_shrinkage", "memory_queue", "conv_inpainting", "pixel_inpainting"),
        "no_masked_shortcut",
    }
    for name, (preset, _) in ABLATIONS.items():
        own, base = Config.ablation(name).to_dict(), preset().to_dict()
        changed = {field for field in own if own[field] != base[field]}
        assert len(changed) == (2 if name == "pixel_inpainting" else 1), name
    assert Config.ablation("pixel_inpainting").pixel_inpainting == 0.25
    assert Config.ablation("no_skip", width=8).width == 8
    with pytest.raises(ConfigError, match=r"ablation must be one of no_space_aware, .*, got 'no_such'"):
        Config.ablation("no_such")


@pytest.mark.parametrize("config", [*(preset() for preset in PRESETS.values()), *map(Config.ablation, ABLATIONS)])
def test_round_trips(config):
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert hash(config) == hash(copy.copy(config))


def test_sweeps_build():
    for patches in (1, 2, 4, 8):
        assert Config(patches=patches).locations == patches**2
    for topk in range(1, 11):
        assert Config(topk=topk).topk == topk
    assert Config(items=50).items == 50 and Config(items=1000).items == 1000
    assert Config(topk=1000).topk == 1000, "more than there are keeps everything"


def test_frozen_and_replace():
    config = tiny.config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 8
    assert config.replace(width=8).width == 8 and config.width == 4
    for build in (config.replace, lambda **values: Config.from_dict(values)):
        with pytest.raises(ConfigError, match=r"'widht' is not a configuration field; the fields are image_size, "):
            build(widht=8)
    with pytest.raises(ConfigError, match="must be a dictionary of fields, got \\[\\]"):
        Config.from_dict([])
    with pytest.raises(ConfigError, match="'epoch' is not a configuration field; the fields are epochs"):
        TrainingConfig.from_dict({"epoch": 3})


WRONG = [
    ({"image_size": 32, "levels": 2}, "image_size must be at least 33, got 32"),
    ({"patches": 0}, "patches must be at least 1, got 0"),
    ({"width": 0}, "width must be at least 1, got 0"),
    ({"levels": 0}, "levels must be at least 1, got 0"),
    ({"skip_levels": -1}, "skip_levels must be at least 0, got -1"),
    ({"merge_levels": -1}, "merge_levels must be at least 0, got -1"),
    ({"items": 0}, "items must be at least 1, got 0"),
    ({"decoder_items": 0}, "decoder_items must be at least 1, got 0"),
    ({"decoder_memories": -1}, "decoder_memories must be at least 0, got -1"),
    ({"topk": 0}, "topk must be at least 1, got 0"),
    ({"heads": 0}, "heads must be at least 1, got 0"),
    ({"skip_levels": 3}, "skip_levels must be at most levels = 2, got 3"),
    ({"merge_levels": 3}, "merge_levels must be at most levels = 2, got 3"),
    ({"decoder_memories": 3}, "decoder_memories must be at most levels = 2, got 3"),
    ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
    ({"temperature": math.nan}, "temperature must be a positive number, got nan"),
    ({"temperature": math.inf}, "temperature must be a positive number, got inf"),
    ({"rho": 1.1}, "rho must be between 0 and 1, got 1.1"),
    ({"rho": math.nan}, "rho must be between 0 and 1, got nan"),
    ({"pixel_inpainting": -0.1}, "pixel_inpainting must be between 0 and 1, got -0.1"),
    ({"hard_threshold": 2}, "hard_threshold must be between 0 and 1, got 2"),
    ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    (
        {"image_size": 60},
        r"image_size must be a multiple of patches \* 2\*\*levels = 8, so that every patch .*, got 60",
    ),
    ({"width": 5, "levels": 1, "skip_levels": 1, "merge_levels": 1, "decoder_memories": 1}, "width must be .*, got 5"),
    ({"heads": 7}, "heads must be a divisor of the 144 bottleneck features, got 7"),
    ({"variational": True}, "inpainting must be 'none' in a variational autoencoder, got 'attention'"),
    ({"signal": 3}, "signal must be a string, got 3"),
    ({"levels": 10**18}, f"levels must be at most 10, got {10**18}"),
    ({"items": 10**9}, f"items must be at most 1000000, got {10**9}"),
    ({"temperature": 10**400}, "temperature must be a number, got 1000"),
    ({"patches": 2.0}, r"patches must be a whole number, got 2\.0"),
    ({"patches": True}, "patches must be a whole number, got True"),
    ({"patches": "2"}, "patches must be a whole number, got '2'"),
    ({"rho": "1"}, "rho must be a number, got '1'"),
    ({"rho": True}, "rho must be a number, got True"),
    ({"space_aware": 1}, "space_aware must be true or false, got 1"),
    ({"border": "wrap"}, "border must be one of 'zero', 'mask', got 'wrap'"),
    ({"memory": None}, "memory must be one of 'matrix', 'queue', got None"),
    ({"threshold": []}, r"threshold must be one of 'inclusive', 'exclusive', got \[\]"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[str(change)[:60] for change, _ in WRONG])
def test_errors_name_field_expectation_and_value(change, message):
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        tiny.config(**change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"generator_every": 0}, "generator_every must be at least 1, got 0"),
        ({"patience": -1}, "patience must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"learning_rate": math.inf}, "learning_rate must be a number of at least 0, got inf"),
        ({"student_weight": -1.0}, "student_weight must be a number of at least 0, got -1.0"),
        ({"scale": 1.0}, "scale must be at least 0 and below 1, got 1.0"),
        ({"precision": "float16"}, "precision must be one of 'auto', 'float32', 'bfloat16', got 'float16'"),
        ({"epochs": 1.5}, "epochs must be a whole number, got 1.5"),
    ],
)
def test_training_errors(change, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        TrainingConfig(**change)


def test_training_defaults_are_the_papers():
    config = TrainingConfig()
    assert (config.epochs, config.batch_size, config.generator_every) == (200, 16, 2)
    assert (config.learning_rate, config.final_learning_rate, config.generator_weight_decay) == (1e-4, 2e-5, 1e-5)
    weights = (config.teacher_weight, config.student_weight, config.distillation_weight, config.adversarial_weight)
    assert weights == (0.01, 10.0, 0.001, 0.005) and config.discriminator_weight == 0.005
    assert (config.translate, config.scale) == (0.05, 0.05)
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_numpy_numbers_become_python_numbers():
    config = Config(topk=np.int64(3), temperature=np.float32(2.0), space_aware=np.bool_(False))
    assert (config.topk, config.temperature, config.space_aware) == (3, 2.0, False)
    assert json.loads(json.dumps(config.to_dict()))["topk"] == 3
    with pytest.raises(ConfigError, match="topk must be at least 1, got 0"):
        Config(topk=np.int64(0))

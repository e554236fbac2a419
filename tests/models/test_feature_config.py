"""The configuration of the feature memory: what it refuses, and its JSON."""

import json

import numpy as np
import pytest
from tiny_features import SIZES

from simsid import FeatureConfig, FeatureMemory
from simsid.errors import ConfigError, InputError


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_size", 16, "image_size must be in 32 to 4096, got 16"),
        ("image_size", 224.0, "image_size must be a whole number"),
        ("neighbors", True, "neighbors must be a whole number"),
        ("penalty", 0.0, "penalty must be greater than 0"),
        ("penalty", float("nan"), "penalty must be"),
        ("synthetic", 1, "synthetic must be true or false"),
        ("signal", "synthetic", "signal must be one of pooled_memory, inpainting, combined"),
        ("signal", "residual", "signal must be one of"),
        ("weight", "heart", "weight must be one of 'lungs', 'uniform' or an array"),
        ("weight", [[1.0, -1.0]], "not all 0"),
        ("weight", [1.0, 2.0], "weight must be an array"),
        ("weight", [["a"]], "weight must be a name or an array"),
        ("layers", "layer1", "layers must be a tuple"),
        ("inputs", "rgb", "inputs must be one of"),
        ("aspect", "squeeze", "aspect must be one of"),
        ("epochs", 3, "is not a configuration field"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_configuration_refuses_the_field_by_name(field, value, message):
    with pytest.raises((ConfigError, InputError), match=message):
        FeatureConfig().replace(**{field: value})


def test_configuration_survives_json():
    config = FeatureConfig(weight=np.eye(3), layers=("a", "b"), synthetic=True, signal="synthetic")
    assert FeatureConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="config must be a FeatureConfig"):
        FeatureMemory({"grid": 7})


def test_sizes_of_the_tests_are_fields_of_the_configuration():
    assert set(SIZES) <= set(FeatureConfig().to_dict())

"""Saved models: the same scores after loading, and one sentence for damaged, foreign and hostile folders."""

import numpy as np
import pytest
import tiny
import torch
from test_model import images, lively

from simsid import checkpoint
from simsid.errors import CheckpointError
from simsid.models.calibration import Calibration
from simsid.models.model import Model


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_load_keeps_scores_bit_for_bit(tmp_path, layout):
    model = lively(memory="queue", threshold="exclusive").to(memory_format=layout)
    model.queue.push(torch.randn(4, 4, 144))
    model.calibrate(images(5), images(3, 1))
    model.save(tmp_path)
    state = torch.get_rng_state()
    loaded = Model.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state), "loading draws from nobody's generator"
    assert not loaded.training and loaded.config == model.config and loaded.calibration == model.calibration
    assert loaded.queue.pointer.item() == 4
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value) and loaded.state_dict()[name].stride() == value.stride()
    for name, column in model.signals(images(4, 2)).items():
        np.testing.assert_array_equal(loaded.signals(images(4, 2))[name], column)
    assert torch.equal(loaded.score(images(4, 2)), model.score(images(4, 2)))


def test_save_over_an_existing_model(tmp_path):
    first, second = tiny.model(0), tiny.model(1, width=8)
    first.save(tmp_path)
    second.save(tmp_path)
    assert Model.load(tmp_path).config.width == 8 and len(list(tmp_path.iterdir())) == 2
    assert Model.load(tmp_path).calibration is None


def test_models_of_other_shapes(tmp_path):
    tiny.model().save(tmp_path)
    tensors, document = checkpoint.read(tmp_path, "model")
    config = document["config"]
    for change, message in [
        ({"width": 8}, r"model.json: tensor encoder\.\S+ must have shape \[.*\], got \["),
        ({"items": 7}, r"model.json: tensor student.inpainting.memory.items must have shape \[4, 7, 144\], got"),
        ({"distillation": False}, r"model.json has the unknown tensor teacher\.\S+ and \d+ more"),
        ({"memory": "queue"}, "model.json lacks tensor student.inpainting.memory.pointer"),
        ({"widht": 8}, "model.json is not a model: 'widht' is not a configuration field"),
        ({"rho": 7}, "model.json is not a model: rho must be between 0 and 1, got 7"),
    ]:
        checkpoint.write(tmp_path, "model", tensors, document | {"config": config | change})
        with pytest.raises(CheckpointError, match=message):
            Model.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": []}, r"a configuration must be a dictionary of fields, got \[\]"),
        ({"calibration": {"mean": 3}}, "calibration must hold mean, std, count and holdout"),
        ({"calibration": [1]}, "calibration must hold mean, std, count and holdout"),
    ],
)
def test_foreign_documents(tmp_path, change, message):
    tiny.model().save(tmp_path)
    tensors, document = checkpoint.read(tmp_path, "model")
    checkpoint.write(tmp_path, "model", tensors, document | change)
    with pytest.raises(CheckpointError, match=f"model.json is not a model: {message}"):
        Model.load(tmp_path)
    del document["config"]
    checkpoint.write(tmp_path, "model", tensors, document)
    with pytest.raises(CheckpointError, match=r"model.json is not a model: it has no 'config'"):
        Model.load(tmp_path)


def test_nonfinite_weight_is_refused_at_load_by_name(tmp_path):
    model = tiny.model()
    with torch.no_grad():
        model.encoder.entry.inner[0].weight[0, 0, 0, 0] = float("nan")
    model.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"tensor encoder.entry.inner.0.weight holds NaN or infinite values"):
        Model.load(tmp_path)


def test_sizes_of_a_foreign_document_are_compared_before_memory_is_taken(tmp_path):
    """A million items a location would be 2 TB; on the meta device their shape alone exists."""
    tiny.model().save(tmp_path)
    tensors, document = checkpoint.read(tmp_path, "model")
    config = document["config"] | {"items": 1_000_000, "decoder_items": 1_000_000, "width": 1024}
    checkpoint.write(tmp_path, "model", tensors, document | {"config": config})
    with pytest.raises(CheckpointError, match="must have shape"):
        Model.load(tmp_path)


def test_calibration_without_the_models_signal_is_refused(tmp_path):
    model = tiny.model()
    model.calibration = Calibration.fit({"residual": np.ones(3)})
    model.save(tmp_path)
    with pytest.raises(CheckpointError, match="calibration lacks the model's signal 'standardized_residual'"):
        Model.load(tmp_path)


def test_a_calibration_that_cannot_be_saved_leaves_the_model(tmp_path):
    model = tiny.model()
    model.save(tmp_path)
    model.calibration = Calibration({"residual": float("nan")}, {"residual": 1.0}, 1)
    with pytest.raises(ValueError):
        model.save(tmp_path)
    assert Model.load(tmp_path).calibration is None

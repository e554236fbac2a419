"""bfloat16: when it is chosen, what stays in float32, and that scores and calibrations belong to one precision."""

import numpy as np
import pytest
import tiny
import tiny_features
import torch
from torch import nn

from simsid import Trainer, TrainingConfig, doctor, load, precision
from simsid.errors import CalibrationError, ExportError, InputError
from simsid.export import export_model
from simsid.models import Calibration, PixelKNN
from simsid.models.signals import SIGNALS


def network():
    model = tiny.model(inpainting="attention").eval()
    # A memory that answers with more than rounding, drawn apart from the weights: no rounding changes its look-ups.
    nn.init.normal_(model.student.inpainting.memory.items, generator=torch.Generator().manual_seed(0))
    return model


def features():
    model = tiny_features.memory()
    model.precision = "bfloat16"
    return model.fit(tiny_features.normal(16))


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "instructions", "chosen"),
    [
        ("auto", "cpu", torch.float32, ("avx512_bf16",), "bfloat16"),
        ("auto", "cpu", torch.float32, (), "float32"),
        ("auto", "cpu", torch.float64, ("amx_bf16",), "float32"),
        ("auto", "cuda", torch.float32, ("avx512_bf16",), "float32"),
        ("bfloat16", "cpu", torch.float32, (), "bfloat16"),
        ("float32", "cpu", torch.float32, ("avx512_bf16",), "float32"),
    ],
)
def test_auto_is_bfloat16_only_on_a_processor_with_instructions(
    monkeypatch, requested, device, dtype, instructions, chosen
):
    monkeypatch.setattr(precision, "bfloat16_instructions", lambda: instructions)
    assert precision.choose_precision(requested, device, dtype) == chosen


@pytest.mark.parametrize(("instructions", "expected"), [(("amx_bf16",), "bfloat16 where"), ((), "float32 where")])
def test_doctor_names_the_precision_and_the_reason(monkeypatch, instructions, expected):
    monkeypatch.setattr(precision, "bfloat16_instructions", lambda: instructions)
    (finding,) = [finding for finding in doctor.examine() if finding.subject == "precision"]
    assert finding.text.startswith(expected) and "amx_bf16" in finding.text and "times as fast" in finding.text


def test_bfloat16_copy_keeps_similarities_and_signals_in_float32_and_the_model_as_it_was():
    model, batch = network(), tiny.images(16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = model.freeze("bfloat16")
    outputs = frozen.outputs(batch)
    for name in ("reconstruction", "query", "retrieved"):
        assert outputs[name].dtype is torch.float32, name
    assert frozen.encoder.entry.inner.weight.dtype is torch.bfloat16
    wide = [*frozen.student.inpainting.memory.parameters(), *frozen.discriminator.parameters()]
    assert {value.dtype for value in wide} == {torch.float32}
    model.precision = "bfloat16"
    model.signals(batch)  # with a copy that shares what it does not convert
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_signals_in_bfloat16_are_those_of_float32_but_for_rounding():
    model, batch = network(), tiny.images(64)
    wide, narrow = (model.freeze(name).signals(batch) for name in ("float32", "bfloat16"))
    assert wide.keys() == narrow.keys() <= SIGNALS.keys()
    for name, values in wide.items():
        assert np.abs(values - narrow[name]).max() <= 0.02 * np.abs(values).max(), name
        assert (values != narrow[name]).any(), name


@pytest.mark.parametrize("make", [lambda: network().freeze("bfloat16"), features], ids=["network", "feature memory"])
def test_score_in_bfloat16_depends_on_no_other_image(make):
    model = make()
    side = model.preprocessing.image_size
    batch = tiny.noise(24, side, seed=3)
    together = model.signals(batch)
    for chosen in ([5], [23, 5], [*range(23, -1, -1)]):
        apart = model.signals(batch[chosen])
        for name, values in together.items():
            np.testing.assert_array_equal(apart[name], values[chosen], err_msg=name)


def test_calibration_keeps_its_precision_and_refuses_another(tmp_path):
    model, batch = network(), tiny.images(8)
    model.precision = "bfloat16"
    model.calibrate(batch)
    model.save(tmp_path)
    loaded = load(tmp_path)
    assert loaded.calibration.precision == loaded.scoring_precision == "bfloat16"
    assert torch.equal(loaded.score(batch), model.score(batch))
    other = load(tmp_path, precision="float32")
    with pytest.raises(CalibrationError, match="calibrated in bfloat16, and scores in float32"):
        other.score(batch)
    with pytest.raises(ExportError, match="calibrate it with precision float32 first"):
        export_model(loaded, tmp_path / "model.pt2", images=tiny.images(32))
    other.calibrate(batch)
    assert other.calibration.precision == "float32" and other.score(batch).isfinite().all()


def test_calibration_of_an_older_version_is_float32():
    values = Calibration.fit({"residual": np.arange(3.0)}, precision="bfloat16").to_dict()
    assert Calibration.from_dict(values).precision == "bfloat16"
    del values["precision"]
    assert Calibration.from_dict(values).precision == "float32"
    with pytest.raises(InputError, match="precision must be float32 or bfloat16, got 'int8'"):
        Calibration.from_dict(values | {"precision": "int8"})


def test_feature_memory_keeps_the_precision_it_was_fitted_in():
    model = features()
    assert model.calibration.precision == "bfloat16"
    images = tiny_features.normal(16)
    model.precision = "auto"
    # Its own images are recognized in the memory, although their features are rounded.
    assert (model.parts.pooled.own_rows(model.describe(images)[0]) == torch.arange(16)).all()
    model.precision = "float32"
    with pytest.raises(CalibrationError, match=r"calibrated in bfloat16.*--preset features --precision float32 -o NEW"):
        model.calibrate(images)


def test_model_that_computes_in_float32_alone_refuses_bfloat16(tmp_path):
    PixelKNN(image_size=16).fit(tiny.noise(9, 16)).save(tmp_path)
    with pytest.raises(InputError, match="precision must be one of auto, float32 here, got 'bfloat16'"):
        load(tmp_path, precision="bfloat16")


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_resumed_training_is_the_uninterrupted_one_bit_for_bit_in_either_precision(tmp_path, name):
    images, models = tiny.images(12), []
    config = TrainingConfig(epochs=3, batch_size=4, checkpoint_seconds=0.0, precision=name)
    for run, stopped in (("whole", False), ("resumed", True)):
        trainer = Trainer(tiny.model(), config, run=tmp_path / run)
        if stopped:
            save, saved = trainer._save, []

            def stop(training, save=save, saved=saved):
                save(training)
                saved.append(training)
                if len(saved) == 4:
                    raise KeyboardInterrupt

            trainer._save = stop
            with pytest.raises(KeyboardInterrupt):
                trainer.fit(images)
            trainer = Trainer(tiny.model(), config, run=tmp_path / run)
        trainer.fit(images, resume=stopped)
        models.append(trainer.model)
    whole, resumed = (model.state_dict() for model in models)
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key
    assert models[0].calibration.precision == "float32"  # whatever the training, unless asked


def test_training_in_bfloat16_follows_float32():
    losses = []
    for name in ("float32", "bfloat16"):
        config = TrainingConfig(epochs=4, batch_size=4, precision=name, learning_rate=1e-3)
        history = Trainer(tiny.model(), config).fit(tiny.images(16))
        losses.append([epoch["loss_student"] for epoch in history.epochs])
    wide, narrow = losses
    assert wide != narrow
    np.testing.assert_allclose(narrow, wide, rtol=0.02)
    assert narrow[-1] < narrow[0]

"""The model: teacher, gradients, scores that depend on nothing but the image, saving and loading."""

import copy
import functools
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch

from simsid.config import ABLATIONS, PRESETS, Config
from simsid.errors import CalibrationError, ConfigError
from simsid.models.inference import network_signals
from simsid.models.losses import adversarial_loss, reconstruction_loss
from simsid.models.model import Model
from simsid.models.scorer import BATCH


def lively(**changes) -> Model:
    """A model whose norms, memories and reconstructions differ from image to image, as a trained one's do."""
    return copy.deepcopy(_lively(tuple(sorted(changes.items()))))


@functools.cache
def _lively(changes: tuple[tuple[str, object], ...]) -> Model:
    made = tiny.model(**dict(changes)).train()
    norms = [module for module in made.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("memory.items"):
                parameter.mul_(4)
        for norm in norms:
            norm.momentum = 0.5
        for step in range(6):
            made.discriminator(made(images(8, 100 + step), teacher=False).student)
        for norm in norms:
            norm.momentum = 0.1
    return made.eval()


def images(count, seed=0):
    """Smooth images that differ in more than noise."""
    torch.manual_seed(seed)
    coarse = torch.randn(count, 1, 6, 6)
    return torch.nn.functional.interpolate(coarse, size=48, mode="bilinear").clamp(-1, 1)


def small(config: Config) -> Config:
    """The same choices at a size that a test can train."""
    sizes = {"width": 4, "items": 6, "decoder_items": 6, "topk": 2, "image_size": 48, "levels": 2, "heads": 2}
    return config.replace(**sizes, patches=min(config.patches, 3))


def generator_loss(model, batch):
    found = model(batch)
    loss = 10 * reconstruction_loss(batch, found.student)
    loss = loss + 0.005 * adversarial_loss(model.discriminator(found.student), real=True)
    if found.teacher is not None:
        loss = loss + 0.01 * reconstruction_loss(batch, found.teacher) + 0.001 * found.distillation
    return loss


CHOICES = {name: preset() for name, preset in PRESETS.items()} | {name: Config.ablation(name) for name in ABLATIONS}


@pytest.mark.parametrize("name", CHOICES)
def test_every_configuration_trains_and_returns(name, tmp_path):
    config = small(CHOICES[name])
    torch.manual_seed(0)
    model = Model(config).train()
    generator_loss(model, tiny.images(3)).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert not without, "every parameter gets a gradient"
    # A bias before a BatchNorm has an exact zero; every weight matrix learns.
    idle = {name for name, p in model.named_parameters() if p.dim() > 1 and not p.grad.any()}
    assert not idle
    assert (model.queue is not None) == (config.memory == "queue")
    assert (model.teacher is None) == (not config.distillation)
    assert model.signal in model.signal_names
    model.calibrate(tiny.images(3))
    model.save(tmp_path)
    loaded = Model.load(tmp_path)
    assert loaded.config == config == Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert torch.equal(loaded.score(tiny.images(2)), model.score(tiny.images(2)))


def test_forward_returns_one_type_and_checks_its_images():
    model = tiny.model().eval()
    found = model(tiny.images(2))
    assert found.student.shape == (2, 1, 48, 48) and found.teacher is None and found.distillation is None
    assert found.query.shape == found.retrieved.shape == (2, 4, 144)
    assert type(model.train()(tiny.images(2))) is type(found)
    assert isinstance(found, tuple) and found._fields[0] == "student", "a NamedTuple, which torch.export can return"
    for bad in (
        torch.zeros(2, 48, 48),
        torch.zeros(2, 3, 48, 48),
        torch.zeros(2, 1, 48, 64),
        torch.zeros(0, 1, 48, 48),
    ):
        with pytest.raises(ValueError, match=r"images must have shape \[B, 1, 48, 48\], B at least 1, got \["):
            model(bad)
    for bad, got in ((torch.zeros(2, 1, 48, 48, dtype=torch.uint8), "torch.uint8"), ([1], "list")):
        with pytest.raises(TypeError, match=f"images must be a floating-point tensor with values in -1..1, got {got}"):
            model(bad)


def test_inference_changes_no_state_and_draws_nothing():
    model = tiny.model(rho=0.5, gumbel_noise=True, dropout=0.5, memory="queue").eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model(tiny.images(2), teacher=True)
    model.signals(tiny.images(2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_teacher_costs_nothing_at_inference():
    model, calls = tiny.model(), []
    for module in model.teacher.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    model.eval()
    model(tiny.images(2))
    model.reconstruct(tiny.images(2))
    model.calibrate(tiny.images(2))
    model.score(tiny.images(2))
    assert not calls
    model.train()(tiny.images(2), teacher=False)
    assert not calls
    assert model(tiny.images(2)).teacher is not None and calls
    calls.clear()
    assert model.eval()(tiny.images(2), teacher=True).distillation.dim() == 0 and calls


@pytest.mark.parametrize("stop", [True, False])
def test_the_teachers_gradient_and_the_encoder(stop):
    model, batch = tiny.model(stop_gradient=stop).train(), tiny.images(2)
    reconstruction_loss(batch, model(batch).teacher).backward()
    assert all(parameter.grad is not None for parameter in model.teacher.parameters())
    reached = any(p.grad is not None and p.grad.any() for p in model.encoder.parameters())
    assert reached == (not stop)
    assert all(parameter.grad is None for parameter in model.student.parameters())


def test_distillation_reaches_both_sides():
    model = tiny.model().train()
    model(tiny.images(2)).distillation.backward()
    for side in (model.student.up, model.teacher.up, model.student.memories, model.encoder):
        assert any(p.grad is not None and p.grad.any() for p in side.parameters())
    assert all(p.grad is None for p in model.discriminator.parameters())


def test_distillation_is_the_sum_over_all_up_blocks():
    model, seen = tiny.model().eval(), {"student": [], "teacher": []}
    for i in range(2):
        model.student.memories[i].register_forward_hook(lambda *args: seen["student"].append(args[2]))
        model.teacher.up[i].register_forward_hook(lambda *args: seen["teacher"].append(args[2]))
    with torch.no_grad():
        found = model(tiny.images(2), teacher=True)
    wanted = sum((s - t).square().mean() for s, t in zip(seen["student"], seen["teacher"]))
    torch.testing.assert_close(found.distillation, wanted)


def test_a_model_without_distillation_has_none():
    model = tiny.model(distillation=False).train()
    found = model(tiny.images(2))
    assert model.teacher is None and found.teacher is None and found.distillation is None
    assert not any(name.startswith("teacher") for name in model.state_dict())


@pytest.mark.parametrize(("patches", "share", "blank"), [(2, 0.25, 1), (2, 0.75, 3), (3, 0.25, 2), (2, 1.0, 4)])
def test_pixel_inpainting_zeroes_its_share_in_training_only(patches, share, blank):
    model, seen = tiny.model(patches=patches, inpainting="none", pixel_inpainting=share), []
    model.encoder.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    batch = tiny.images(8)
    model.train()(batch)
    model.eval()(batch)
    shown, whole = (x.view(8, patches**2, -1) for x in seen)
    zeroed = (shown == 0).all(-1)
    assert (zeroed.sum(1) == blank).all(), "exactly the share, in every image"
    assert torch.equal(shown[~zeroed], whole[~zeroed]), "the others are untouched"
    assert not (whole == 0).all(-1).any()
    if share < 1:
        assert (zeroed != zeroed[0]).any(), "drawn for each image"


# Scores


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_scores_in_any_order_are_equal_bit_for_bit(layout, batch_size):
    model, batch = lively().to(memory_format=layout), images(6)
    whole = model.signals(batch, batch_size=batch_size)
    for seed, count in ((0, 6), (1, 5), (2, 1)):
        order = np.random.default_rng(seed).permutation(6)[:count]
        part = model.signals(batch[order], batch_size=batch_size)
        for name in model.signal_names:
            np.testing.assert_array_equal(part[name], whole[name][order], err_msg=name)


def test_scores_do_not_depend_on_the_batch():
    """Bit for bit: every batch is filled up to one size."""
    model, batch = lively(), images(BATCH + 3)
    model.calibrate(batch)
    whole, made = model.score(batch), model.reconstruct(batch)
    for count in (1, BATCH, BATCH + 1):
        assert torch.equal(model.score(batch[:count]), whole[:count])
        assert torch.equal(model.reconstruct(batch[:count]), made[:count])
    assert torch.equal(model.score(batch[[5]])[0], whole[5])


def test_batch_sizes_agree_within_rounding():
    """Only where another size is asked for; an untrained discriminator's logits spread little about their mean."""
    model, batch = lively(), images(10)
    whole = model.signals(batch, batch_size=10)
    for batch_size in (1, 3):
        part = model.signals(batch, batch_size=batch_size)
        for name in model.signal_names:
            most = 1e-4 if name.startswith("discriminator") else 1e-5
            assert np.abs(part[name] - whole[name]).max() <= most * whole[name].std(), (name, batch_size)


def test_order_does_not_matter_on_two_threads():
    """In a process of its own, whose threads wait without spinning: tests share their machine."""
    script = (
        "import sys, torch\n"
        "sys.path[:0] = sys.argv[1:]\n"
        "import test_model\n"
        "torch.set_num_threads(2)\n"
        "model, batch = test_model.lively(), test_model.images(5)\n"
        "whole = model.signals(batch, batch_size=3)\n"
        "part = model.signals(batch.flip(0), batch_size=3)\n"
        "assert all((part[name] == whole[name][::-1]).all() for name in whole)\n"
    )
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}
    folders = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
    subprocess.run([sys.executable, "-c", script, *folders], check=True, env=environment)


def test_signals_are_what_they_are_called():
    model, batch = lively(), images(4)
    found = model.signals(batch, batch_size=4)
    with torch.no_grad():
        made = model(batch)
        logits = {s: model.discriminator(made.student, s).double() for s in ("module", "per_image")}
        alone = torch.stack([copy.deepcopy(model.discriminator).train()(image[None])[0] for image in made.student])
    # Scored with the BatchNorms folded into the convolutions, which rounds otherwise.
    np.testing.assert_allclose(found["discriminator_running"], -logits["module"].numpy(), rtol=1e-4)
    np.testing.assert_allclose(found["discriminator_per_image"], -logits["per_image"].numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["discriminator_per_image"], -alone.numpy(), rtol=1e-4, atol=1e-5)
    error = (batch.double() - made.student.double()).square()
    np.testing.assert_allclose(found["residual"], error.mean((1, 2, 3)).numpy(), rtol=1e-5)
    assert all(column.dtype == np.float64 and column.shape == (4,) for column in found.values())
    assert tuple(found) == model.signal_names and len(found) == 8
    assert tuple(model.signals(batch, ["residual"])) == ("residual",)


def test_signals_refuse_what_they_cannot_give():
    model = tiny.model(inpainting="none")
    assert "memory_distance" not in model.signal_names and len(model.signals(tiny.images(1))) == 6
    for name in ("memory_distance", "nonsense"):
        with pytest.raises(ValueError, match=f"signal must be one of discriminator_per_image, .*, got '{name}'"):
            model.signals(tiny.images(1), [name])
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
            model.signals(tiny.images(1), batch_size=size)


@pytest.mark.parametrize("signal", network_signals(Config()))
def test_score_is_the_sigmoid_of_the_standardized_signal(signal):
    model, batch = lively(signal=signal), images(12)
    model.calibrate(batch[:8])
    score = model.score(batch)
    assert score.dtype == torch.float64 and score.shape == (12,) and (score >= 0).all() and (score <= 1).all()
    assert model.signal == signal
    raw = model.signals(batch)[signal]
    assert torch.equal(score.argsort(), torch.from_numpy(raw).argsort()), "monotone in the raw signal"
    mean, std = raw[:8].mean(), raw[:8].std()
    np.testing.assert_allclose(score, 1 / (1 + np.exp(-(raw - mean) / std)), rtol=1e-9)


def test_calibration_from_a_tensor_or_a_loader():
    model, batch = lively(), images(17)
    model.calibrate(batch, batch[:5])
    whole = model.calibration
    for loader in (torch.utils.data.DataLoader(batch, batch_size=16), iter(batch.split(9))):
        model.calibrate(loader, iter([batch[:2], batch[2:5]]))
        assert model.calibration == whole
    assert whole.count == 17 and set(whole.mean) == set(model.signal_names) == set(whole.holdout)
    assert whole.mean["residual"] == np.mean(model.signals(batch)["residual"])
    with pytest.raises(ValueError, match="calibration needs at least one normal image, got none"):
        model.calibrate([])


def test_calibration_travels_in_the_state_dict(tmp_path):
    model = lively()
    model.calibrate(images(5), images(3, 1))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = tiny.model(1)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.calibration == model.calibration
    other.load_state_dict(tiny.model().state_dict())
    assert other.calibration is None
    with pytest.raises(TypeError, match="extra state must be a uint8 tensor, got dict"):
        other.set_extra_state({})
    with pytest.raises(ValueError, match="extra state must be JSON"):
        other.set_extra_state(torch.tensor([1, 2], dtype=torch.uint8))


def test_uncalibrated():
    with pytest.raises(CalibrationError, match=r"the model is not calibrated: call calibrate\(images\)"):
        tiny.model().score(tiny.images(1))


def test_modes_are_left_as_they_were():
    model = tiny.model().train()
    model.teacher.eval()
    model.reconstruct(tiny.images(1))
    assert model.training and model.student.training and not model.teacher.training
    with pytest.raises(TypeError):
        model.signals([None])
    assert model.training and not model.teacher.training
    assert not model.reconstruct(tiny.images(1)).is_inference(), "fit for training on, too"


# Precision, copies, arguments


def test_float64_runs_throughout():
    model, batch = tiny.model().double(), tiny.images(2).double()
    found = model.train()(batch)
    assert found.student.dtype == found.teacher.dtype == found.distillation.dtype == torch.float64
    generator_loss(model, batch).backward()
    assert all(parameter.grad.dtype == torch.float64 for parameter in model.parameters())
    model.calibrate(tiny.images(3))
    assert model.score(tiny.images(2)).shape == (2,)
    single = tiny.model()
    single.calibrate(tiny.images(3))
    np.testing.assert_allclose(single.calibration.mean["residual"], model.calibration.mean["residual"], rtol=1e-2)


@pytest.mark.parametrize("changes", [{}, {"memory": "queue"}, {"shrinkage": "hard"}, {"inpainting": "convolution"}])
def test_bfloat16_autocast(changes):
    model, batch = tiny.model(rho=0.9, gumbel_noise=True, **changes).train(), tiny.images(2)
    with torch.autocast("cpu", torch.bfloat16):
        loss, query = generator_loss(model, batch), model(batch).query
        assert model.discriminator(batch, "per_image").dtype == torch.float32
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    if model.queue is not None:
        model.queue.push(query)
        assert model.queue.items.dtype == torch.float32


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_score_alike(duplicate):
    model = lively()
    model.calibrate(images(4))
    assert torch.equal(duplicate(model).score(images(2)), model.score(images(2)))


@pytest.mark.parametrize("fused", [True, False, "auto"])
def test_fused(fused):
    model = tiny.model().eval()
    torch.manual_seed(0)
    other = Model(tiny.config(), fused=fused).eval()
    assert other.student.inpainting.memory.backend == ("torch" if fused is False else "auto")
    assert other.student.memories[0].memory.backend == other.student.inpainting.mixing.backend
    assert torch.equal(other(tiny.images(1)).student, model(tiny.images(1)).student), "on a CPU all are the reference"


def test_arguments():
    assert Model(tiny.config(), width=8).config.width == 8
    with pytest.raises(ConfigError, match=r"fused must be True, False or 'auto', got 'yes'"):
        Model(tiny.config(), fused="yes")
    with pytest.raises(ConfigError, match=r"config must be a Config, got \{'width': 8\}"):
        Model({"width": 8})
    with pytest.raises(ConfigError, match="'widht' is not a configuration field"):
        Model(tiny.config(), widht=8)
    for changes in ({"signal": "nonsense"}, {"signal": "memory_distance", "inpainting": "none"}):
        with pytest.raises(ConfigError, match=f"signal must be one of discriminator_.*, got '{changes['signal']}'"):
            Model(tiny.config(**changes))
    with pytest.raises(ConfigError, match="backend must be one of 'auto', 'triton', 'torch', got 'cuda'"):
        Model(tiny.config(), backend="cuda")


def test_backend_can_be_demanded(monkeypatch):
    # The kernels' tests switch Triton's interpreter on for their whole process.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = Model(tiny.config(), backend="triton").eval()
    with pytest.raises(RuntimeError, match='backend="triton" cannot run here: Triton kernels run on CUDA'):
        model(tiny.images(1))
    assert Model(tiny.config(), backend="torch").eval()(tiny.images(1)).student.shape == (1, 1, 48, 48)

"""The trainer: updates, schedule, randomness, validation, early stopping, and the objects it accepts."""

import copy
import json
import math
import random
import sys
import types

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional as F

from simsid import Trainer, TrainingConfig, checkpoint, data
from simsid.errors import RunError
from simsid.models.memory import SpaceAwareMemory
from simsid.training import step as step_module
from simsid.training import trainer as trainer_module
from simsid.training.step import TrainingStep

PLAIN = {"translate": 0.0, "scale": 0.0, "batch_size": 4, "precision": "float32"}
"""No augmentation, and float32: what a step computes is then a function of the images alone."""


def fit(model, images, val=None, run=None, resume=False, **options):
    trainer = Trainer(model, TrainingConfig(**{"batch_size": 4, "epochs": 1, **options}), run=run)
    return trainer.fit(images, val, resume=resume)


def weights(model):
    """Return a copy of a model's parameters and buffers."""
    return {name: value.clone() for name, value in checkpoint.tensors(model).items()}


def same(one, other):
    """Return whether two models' weights are bitwise equal."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def capture_steps(monkeypatch):
    """Return a list that every `TrainingStep` made by a trainer is added to."""
    steps = []

    class Spy(TrainingStep):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            steps.append(self)

    monkeypatch.setattr(trainer_module, "TrainingStep", Spy)
    return steps


def plain_step(model, optimizers, images, step):
    """One iteration in plain PyTorch, term by term. Source: SimSID, section 3.5."""
    generator, discriminator = optimizers
    one, zero = torch.ones(len(images)), torch.zeros(len(images))
    outputs = model(images, teacher=step % 2 == 0)

    discriminator.zero_grad()
    real = F.binary_cross_entropy_with_logits(model.discriminator(images), one)
    fake = F.binary_cross_entropy_with_logits(model.discriminator(outputs.student.detach()), zero)
    (0.005 * (real + fake)).backward()
    discriminator.step()
    if step % 2:
        return
    teacher = ((images - outputs.teacher) ** 2).mean()
    student = ((images - outputs.student) ** 2).mean()
    adversarial = F.binary_cross_entropy_with_logits(model.discriminator(outputs.student), one)
    generator.zero_grad()
    (0.01 * teacher + 10 * student + 0.001 * outputs.distillation + 0.005 * adversarial).backward()
    generator.step()
    discriminator.zero_grad()


def test_training_equals_plain_pytorch(monkeypatch):
    # A small rate: at the papers', rounding decides within a few steps which ReLUs are open.
    images, steps, rate = tiny.images(4), 5, 1e-6
    ours, plain = tiny.model(), tiny.model()
    trainer = Trainer(ours, TrainingConfig(epochs=steps, **PLAIN, learning_rate=rate, final_learning_rate=rate))
    steps_made = capture_steps(monkeypatch)
    # One iteration per epoch.
    trainer.fit(images)
    (made,) = steps_made

    sides = [[], []]
    for name, parameter in plain.named_parameters():
        sides[name.startswith("discriminator")].append(parameter)
    optimizers = (
        torch.optim.Adam(sides[0], lr=rate, betas=(0.5, 0.999), eps=1e-7, weight_decay=1e-5),
        torch.optim.Adam(sides[1], lr=rate, betas=(0.5, 0.999), eps=1e-8),
    )
    plain.train()
    for step in range(steps):
        order = np.random.default_rng([0, 1, step]).permutation(4)
        plain_step(plain, optimizers, images[order], step)

    moments = {}
    for optimizer in optimizers:
        moments |= optimizer.state
    names = dict(plain.named_parameters())
    compared = 0
    for name, parameter in ours.named_parameters():
        side = "discriminator" if name.startswith("discriminator") else "generator"
        actual, expected = made.optimizers[side].state[parameter], moments[names[name]]
        assert actual["step"].item() == expected["step"].item() == (5 if side == "discriminator" else 3)
        size = expected["exp_avg"].abs().max()
        # A bias before a normalization has a gradient of pure rounding, which Adam scales up to full steps.
        if size > 1e-7:
            assert (actual["exp_avg"] - expected["exp_avg"]).abs().max() < 1e-2 * size, name
            drift = (parameter - names[name]).abs()
            assert (drift > rate / 5).float().mean() < 0.02, name
            compared += 1
    assert compared > 60
    actual, expected = dict(ours.named_buffers()), dict(plain.named_buffers())
    for name, buffer in expected.items():
        assert torch.allclose(actual[name].float(), buffer.float(), rtol=1e-2, atol=1e-3), name


def test_optimizers_have_the_papers_settings(monkeypatch):
    steps = capture_steps(monkeypatch)
    trainer = Trainer(tiny.model(), TrainingConfig(epochs=1, **PLAIN))
    trainer.fit(tiny.images(4))
    expected = {
        "generator": {"betas": (0.5, 0.999), "eps": 1e-7, "weight_decay": 1e-5, "amsgrad": False},
        "discriminator": {"betas": (0.5, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False},
    }
    owned = {}
    for side, settings in expected.items():
        optimizer = steps[0].optimizers[side]
        assert type(optimizer) is torch.optim.Adam, "AdamW decouples the weight decay, which is another method"
        (group,) = optimizer.param_groups
        assert {name: group[name] for name in settings} == settings
        owned[side] = {id(parameter) for parameter in group["params"]}
    assert owned["discriminator"] == {id(parameter) for parameter in trainer.model.discriminator.parameters()}
    assert len(owned["generator"] | owned["discriminator"]) == len(list(trainer.model.parameters()))
    assert not owned["generator"] & owned["discriminator"]


def test_learning_rate_follows_the_cosine_schedule():
    config = TrainingConfig()
    rates = [trainer_module.learning_rate(config, epoch) for epoch in range(200)]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200, eta_min=2e-5)
    expected = []
    for _ in range(200):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected, rel=1e-6)
    assert rates[0] == 1e-4 and rates[100] == pytest.approx(6e-5) and 2e-5 < rates[-1] < 2.001e-5
    history = fit(tiny.model(), tiny.images(4), epochs=2)
    assert [epoch["learning_rate"] for epoch in history.epochs] == pytest.approx([1e-4, 6e-5])


def test_teacher_runs_only_where_the_generator_is_updated():
    model, calls = tiny.model(), []
    model.teacher.register_forward_hook(lambda *_: calls.append("teacher"))
    model.student.register_forward_hook(lambda module, *_: calls.append("student") if module.training else None)
    # Six iterations: the teacher runs at 0, 2 and 4, and in neither validation nor calibration.
    fit(model, tiny.images(12), tiny.images(3, 1), epochs=2)
    assert calls == ["student", "teacher", "student"] * 3


def test_discriminator_is_updated_before_the_generator(monkeypatch):
    updated = []
    real = TrainingStep._update

    def spy(self, side, *rest):
        updated.append(side)
        real(self, side, *rest)

    monkeypatch.setattr(TrainingStep, "_update", spy)
    fit(tiny.model(), tiny.images(12))
    assert updated == ["discriminator", "generator", "discriminator", "discriminator", "generator"]


def test_queue_is_updated_only_after_the_generator(monkeypatch):
    model = tiny.model(memory="queue")
    before, pushes = weights(model), []
    push = SpaceAwareMemory.push

    def spy(self, query, unless):
        assert not torch.equal(model.encoder.entry.entry[0].weight, before["encoder.entry.entry.0.weight"])
        pushes.append((self.items.clone(), query.clone()))
        push(self, query, unless)

    monkeypatch.setattr(SpaceAwareMemory, "push", spy)
    fit(model, tiny.images(8), tiny.images(3, 1))
    # Two iterations, of which the first updates the generator; validation and calibration push nothing.
    ((content, query),) = pushes
    assert torch.equal(content, before["student.inpainting.memory.items"])
    assert model.queue.pointer.item() == 4
    assert torch.equal(model.queue.items[:, :4], query.transpose(0, 1))
    assert torch.equal(model.queue.items[:, 4:], content[:, 4:])


@pytest.mark.parametrize("changes", [{}, {"memory": "queue", "rho": 0.7, "dropout": 0.3}, {"distillation": False}])
def test_same_seed_gives_the_same_weights(changes):
    first, again, other = (tiny.model(**changes) for _ in range(3))
    images = tiny.images(9)
    fit(first, images, seed=3, epochs=2)
    # The user's own random numbers must not matter.
    torch.manual_seed(99)
    torch.rand(5)
    fit(again, images, seed=3, epochs=2)
    fit(other, images, seed=4, epochs=2)
    assert same(weights(first), weights(again))
    assert not same(weights(first), weights(other))


def test_every_iteration_has_its_own_random_numbers(monkeypatch):
    drawn = {}
    for seed in (0, 1):
        numbers = drawn[seed] = []
        monkeypatch.setattr(
            step_module,
            "augment",
            lambda images, numbers=numbers, **_: (numbers.append(torch.rand(1).item()), images)[1],
        )
        for _ in range(2):
            fit(tiny.model(), tiny.images(12), epochs=2, seed=seed)
    for numbers in drawn.values():
        assert numbers[:6] == numbers[6:] and len(set(numbers)) == 6
    assert not set(drawn[0]) & set(drawn[1])


def test_second_fit_starts_with_new_optimizers():
    model = tiny.model()
    before, images = weights(model), tiny.images(8)
    trainer = Trainer(model, TrainingConfig(epochs=2, batch_size=4))
    trainer.fit(images)
    after = weights(model)
    model.load_state_dict({**model.state_dict(), **before})
    trainer.fit(images)
    assert same(after, weights(model))


def test_number_of_decoding_threads_changes_nothing(tmp_path):
    files = tiny.films(tmp_path, 9)
    results = []
    for workers in (1, 5):
        images = data.load_images(files, 48, workers=workers)
        model = tiny.model()
        fit(model, images)
        results.append(weights(model))
    assert same(*results)


def test_global_random_state_is_untouched():
    model = tiny.model(rho=0.7)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    fit(model, tiny.images(8), tiny.images(2, 1))
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert states[2] == random.getstate()


def script(monkeypatch, values):
    """Replace the iterations by nothing, and validation by these results."""
    results = iter(values)
    monkeypatch.setattr(TrainingStep, "__call__", lambda *_: None)
    monkeypatch.setattr(trainer_module, "validate", lambda *_: next(results))


def test_patience_stops_the_training_and_the_best_epoch_is_kept(monkeypatch):
    values = [5.0, 3.0, 4.0, 3.5, 1.0]
    script(monkeypatch, [{"val_reconstruction": value} for value in values])
    model, states = tiny.model(), []
    real = trainer_module.choose_best

    def choose(*arguments):
        """Change the model in every epoch, because no iteration does, and remember it."""
        with torch.no_grad():
            model.student.output.bias.add_(1e-3)
        states.append(weights(model))
        return real(*arguments)

    monkeypatch.setattr(trainer_module, "choose_best", choose)
    history = fit(model, tiny.images(4), tiny.images(2, 1), epochs=9, patience=2)
    assert [epoch["val_reconstruction"] for epoch in history.epochs] == [5.0, 3.0, 4.0, 3.5]
    assert (history.best_epoch, history.best_value) == (1, -3.0)
    assert same(weights(model), states[1]) and not same(states[1], states[3])
    assert not model.training and len(model.calibration.holdout["residual"]) == 2


def test_training_without_validation_keeps_the_last_epoch():
    history = fit(tiny.model(), tiny.images(4), epochs=3)
    assert history.best_epoch == 2 and len(history.epochs) == 3


def test_progress_of_an_epoch_without_generator_update(capsys):
    """With one iteration per epoch, the second epoch has no reconstruction loss to show."""
    history = Trainer(tiny.model(), TrainingConfig(epochs=2, batch_size=16), progress=True).fit(tiny.images(5))
    assert "loss_student" in history.epochs[0] and "loss_student" not in history.epochs[1]
    output = capsys.readouterr()
    assert "epoch   2" in output.err and not output.out


def test_bfloat16_trains_under_autocast():
    model = tiny.model(memory="queue")
    kinds = set()
    model.student.up[0].entry[0].register_forward_hook(
        lambda module, _, output: kinds.add(output.dtype) if module.training else None
    )
    history = fit(model, tiny.images(8), tiny.images(2, 1), precision="bfloat16")
    assert kinds == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(math.isfinite(value) for value in history.epochs[0].values())


def test_tensorboard_is_optional(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    options = TrainingConfig(tensorboard=True, epochs=2, batch_size=4)
    with pytest.raises(RunError, match=r"pip install 'simsid\[tensorboard\]'"):
        Trainer(tiny.model(), options, run=tmp_path / "run")
    with pytest.raises(RunError, match="needs a run folder"):
        Trainer(tiny.model(), options)
    assert not (tmp_path / "run").exists()

    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append(("open", purge_step))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            written.append(("close", 0))

        def add_scalar(self, name, value, step):
            written.append((name, step))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    Trainer(tiny.model(), options, run=tmp_path / "run").fit(tiny.images(8))
    assert written[0] == ("open", 1) and written[-1] == ("close", 0)
    assert ("loss_student", 1) in written and ("loss_student", 2) in written


def test_tensorboard_events_are_written(tmp_path):
    pytest.importorskip("tensorboard")
    fit(tiny.model(), tiny.images(4), run=tmp_path / "run", tensorboard=True)
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_losses_are_averaged_over_an_epoch(monkeypatch):
    def iterate(self, images, with_generator):
        number = self.guard.iteration.item()
        self._sums += torch.tensor([number, 0, 10 * number if with_generator else 0, 0, 0, 0, 0])

    monkeypatch.setattr(TrainingStep, "_iterate", iterate)
    first, second = fit(tiny.model(), tiny.images(12), epochs=2).epochs
    assert (first["loss_real"], first["loss_student"]) == (1.0, 10.0)
    assert (second["loss_real"], second["loss_student"]) == (4.0, 40.0)


def test_history_holds_plain_values(tmp_path):
    history = fit(tiny.model(), tiny.images(8), tiny.images(2, 1), run=tmp_path / "run", epochs=2)
    assert json.loads(json.dumps(history.epochs)) == history.epochs
    assert copy.deepcopy(history) == history and not history.interrupted
    assert [epoch["step"] for epoch in history.epochs] == [2, 4]

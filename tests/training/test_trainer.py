"""The training step and its surroundings: updates, schedule, randomness, early stopping, what is not finite."""

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

from simsid import Model, Trainer, TrainingConfig, checkpoint, data
from simsid.errors import NonFiniteError, RunError
from simsid.models.memory import SpaceAwareMemory
from simsid.training import step as step_module
from simsid.training import trainer as training
from simsid.training.step import TrainingStep

PLAIN = {"translate": 0.0, "scale": 0.0, "batch_size": 4}
"""No augmentation: what a step computes is then a function of the images alone."""


def fit(model, images, val=None, run=None, resume=False, **options):
    trainer = Trainer(model, TrainingConfig(**{"batch_size": 4, "epochs": 1, **options}), run=run)
    return trainer.fit(images, val, resume=resume)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def written_out_step(model, optimizers, images, step):
    """SPEC section 4, term by term."""
    generator, discriminator = optimizers
    one, zero = torch.ones(len(images)), torch.zeros(len(images))
    found = model(images, teacher=step % 2 == 0)

    discriminator.zero_grad()
    real = F.binary_cross_entropy_with_logits(model.discriminator(images), one)
    fake = F.binary_cross_entropy_with_logits(model.discriminator(found.student.detach()), zero)
    (0.005 * (real + fake)).backward()
    discriminator.step()
    if step % 2:
        return
    teacher = ((images - found.teacher) ** 2).mean()
    student = ((images - found.student) ** 2).mean()
    fooled = F.binary_cross_entropy_with_logits(model.discriminator(found.student), one)
    generator.zero_grad()
    (0.01 * teacher + 10 * student + 0.001 * found.distillation + 0.005 * fooled).backward()
    generator.step()
    discriminator.zero_grad()


def test_steps_are_those_written_out():
    # At the papers' rate, rounding decides within a few steps which ReLUs are open.
    images, steps, rate = tiny.images(4), 5, 1e-6
    ours, plain = tiny.model(), tiny.model()
    trainer = Trainer(ours, TrainingConfig(epochs=steps, **PLAIN, learning_rate=rate, final_learning_rate=rate))
    # One iteration an epoch; what follows the last one is not of interest here.
    trainer._calibrate = lambda *_: None
    trainer.fit(images)

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
        written_out_step(plain, optimizers, images[order], step)

    state = {}
    for optimizer in optimizers:
        state |= optimizer.state
    names = dict(plain.named_parameters())
    compared = 0
    for name, parameter in ours.named_parameters():
        side = "discriminator" if name.startswith("discriminator") else "generator"
        mine, theirs = trainer._step.optimizers[side].state[parameter], state[names[name]]
        assert mine["step"].item() == theirs["step"].item() == (5 if side == "discriminator" else 3)
        size = theirs["exp_avg"].abs().max()
        # A bias before a normalisation has a gradient of nothing but rounding, which Adam blows up to full steps.
        if size > 1e-7:
            assert (mine["exp_avg"] - theirs["exp_avg"]).abs().max() < 1e-2 * size, name
            drift = (parameter - names[name]).abs()
            assert (drift > rate / 5).float().mean() < 0.02, name
            compared += 1
    assert compared > 60
    mine, theirs = dict(ours.named_buffers()), dict(plain.named_buffers())
    for name, buffer in theirs.items():
        assert torch.allclose(mine[name].float(), buffer.float(), rtol=1e-2, atol=1e-3), name


def test_optimizers_are_the_papers():
    trainer = Trainer(tiny.model(), TrainingConfig(epochs=1, **PLAIN))
    trainer.fit(tiny.images(4))
    expected = {
        "generator": {"betas": (0.5, 0.999), "eps": 1e-7, "weight_decay": 1e-5, "amsgrad": False},
        "discriminator": {"betas": (0.5, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False},
    }
    owned = {}
    for side, settings in expected.items():
        optimizer = trainer._step.optimizers[side]
        assert type(optimizer) is torch.optim.Adam, "decoupled weight decay is another method"
        (group,) = optimizer.param_groups
        assert {name: group[name] for name in settings} == settings
        owned[side] = {id(parameter) for parameter in group["params"]}
    assert owned["discriminator"] == {id(parameter) for parameter in trainer.model.discriminator.parameters()}
    assert len(owned["generator"] | owned["discriminator"]) == len(list(trainer.model.parameters()))
    assert not owned["generator"] & owned["discriminator"]


def test_learning_rate_follows_the_cosine(monkeypatch):
    for name in ("_calibrate", "_keep", "_load_best"):
        monkeypatch.setattr(Trainer, name, lambda *_: None)
    monkeypatch.setattr(TrainingStep, "__call__", lambda *_: None)
    rates = [epoch["learning_rate"] for epoch in fit(tiny.model(), tiny.images(9), epochs=200).epochs]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200, eta_min=2e-5)
    expected = []
    for _ in range(200):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected, rel=1e-6)
    assert rates[0] == 1e-4 and rates[100] == pytest.approx(6e-5) and 2e-5 < rates[-1] < 2.001e-5


def test_teacher_costs_nothing_where_the_discriminator_trains_alone():
    model, calls = tiny.model(), []
    model.teacher.register_forward_hook(lambda *_: calls.append("teacher"))
    model.student.register_forward_hook(lambda module, *_: calls.append("student") if module.training else None)
    # Six iterations: the teacher at 0, 2 and 4, and in neither validation nor calibration.
    fit(model, tiny.images(12), tiny.images(3, 1), epochs=2)
    assert calls == ["student", "teacher", "student"] * 3


def test_one_iteration_updates_the_discriminator_first(monkeypatch):
    updated = []
    real = TrainingStep._update

    def spy(self, side, *rest):
        updated.append(side)
        real(self, side, *rest)

    monkeypatch.setattr(TrainingStep, "_update", spy)
    fit(tiny.model(), tiny.images(12))
    assert updated == ["discriminator", "generator", "discriminator", "discriminator", "generator"]


def test_the_queue_is_fed_after_the_update_only(monkeypatch):
    model = tiny.model(memory="queue")
    before, pushes = weights(model), []
    push = SpaceAwareMemory.push

    def spy(self, query, unless):
        assert not torch.equal(model.encoder.entry.entry[0].weight, before["encoder.entry.entry.0.weight"])
        pushes.append((self.items.clone(), query.clone()))
        push(self, query, unless)

    monkeypatch.setattr(SpaceAwareMemory, "push", spy)
    fit(model, tiny.images(8), tiny.images(3, 1))
    # Two iterations, of which the first trains the generator; validation and calibration feed nothing.
    ((content, query),) = pushes
    assert torch.equal(content, before["student.inpainting.memory.items"])
    assert model.queue.pointer.item() == 4
    assert torch.equal(model.queue.items[:, :4], query.transpose(0, 1))
    assert torch.equal(model.queue.items[:, 4:], content[:, 4:])


@pytest.mark.parametrize("changes", [{}, {"memory": "queue", "rho": 0.7, "dropout": 0.3}, {"distillation": False}])
def test_same_seed_same_weights(changes):
    first, again, other = (tiny.model(**changes) for _ in range(3))
    images = tiny.images(9)
    fit(first, images, seed=3, epochs=2)
    # What the user seeds and draws in between is the user's own affair.
    torch.manual_seed(99)
    torch.rand(5)
    fit(again, images, seed=3, epochs=2)
    fit(other, images, seed=4, epochs=2)
    assert same(weights(first), weights(again))
    assert not same(weights(first), weights(other))


def test_every_iteration_draws_its_own_numbers(monkeypatch):
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


def test_fitting_again_starts_anew():
    model = tiny.model()
    before, images = weights(model), tiny.images(8)
    trainer = Trainer(model, TrainingConfig(epochs=2, batch_size=4))
    trainer.fit(images)
    after = weights(model)
    model.load_state_dict(before)
    trainer.fit(images)
    assert same(after, weights(model))


def test_workers_change_nothing(tmp_path):
    files = tiny.films(tmp_path, 9)
    results = []
    for workers in (1, 5):
        images = data.load_images(files, 48, workers=workers)
        model = tiny.model()
        fit(model, images)
        results.append(weights(model))
    assert same(*results)


def test_the_users_random_numbers_are_untouched():
    model = tiny.model(rho=0.7)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    fit(model, tiny.images(8), tiny.images(2, 1))
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert states[2] == random.getstate()


def script(monkeypatch, values):
    """Let training do nothing, and validation find these values."""
    found = iter(values)
    monkeypatch.setattr(TrainingStep, "__call__", lambda *_: None)
    monkeypatch.setattr(Trainer, "_validate", lambda *_: next(found))


def test_patience_stops_and_the_best_epoch_is_kept(monkeypatch):
    values = [5.0, 3.0, 4.0, 3.5, 1.0]
    script(monkeypatch, [{"val_reconstruction": value} for value in values])
    model, kept = tiny.model(), []
    monkeypatch.setattr(Trainer, "_judge", spy_on(Trainer._judge, kept, lambda: weights(model), model))
    history = fit(model, tiny.images(4), tiny.images(2, 1), epochs=9, patience=2)
    assert [epoch["val_reconstruction"] for epoch in history.epochs] == [5.0, 3.0, 4.0, 3.5]
    assert (history.best_epoch, history.best_value) == (1, -3.0)
    assert same(weights(model), kept[1]) and not same(kept[1], kept[3])
    assert not model.training and len(model.calibration.holdout["residual"]) == 2


def spy_on(judge, kept, snapshot, model):
    """Change the model in every epoch, where nothing trains it, and remember it as it was judged."""

    def spied(*arguments):
        with torch.no_grad():
            model.student.output.bias.add_(1e-3)
        kept.append(snapshot())
        return judge(*arguments)

    return spied


def test_a_run_without_validation_keeps_the_last_epoch():
    history = fit(tiny.model(), tiny.images(4), epochs=3)
    assert history.best_epoch == 2 and len(history.epochs) == 3


def test_values_that_are_not_finite_are_never_the_best(monkeypatch, tmp_path):
    values = [{}, {"val_auc_discriminator_per_image": 0.3}, {}, {"val_auc_discriminator_per_image": 0.2}]
    script(monkeypatch, values)
    labels = data.ImageSet(
        torch.zeros(2, 1, 48, 48, dtype=torch.uint8), (data.Record("a", label=0), data.Record("b", label=1))
    )
    history = fit(tiny.model(), tiny.images(4), labels, run=tmp_path / "run", epochs=4, criterion="auc")
    assert (history.best_epoch, history.best_value) == (1, 0.3)


def test_validation_leaves_out_what_is_not_finite():
    model = tiny.model()
    with torch.no_grad():
        model.discriminator.output.bias.fill_(math.nan)
    trainer = Trainer(model)
    found = trainer._validate(training._as_images(tiny.images(3)))
    assert list(found) == ["val_reconstruction"] and math.isfinite(found["val_reconstruction"])


def test_validation_measures_every_signal():
    images = data.ImageSet(
        torch.randint(0, 256, (6, 1, 48, 48), dtype=torch.uint8),
        tuple(data.Record(str(i), label=label) for i, label in enumerate((0, 0, 0, 1, 1, -1))),
    )
    history = fit(tiny.model(), tiny.images(4), images)
    names = [name for name in history.epochs[0] if name.startswith("val_auc_")]
    assert names == [f"val_auc_{name}" for name in tiny.model().signal_names]
    assert history.best_value == history.epochs[0]["val_auc_discriminator_per_image"]


def test_one_iteration_an_epoch_with_progress(capsys):
    """The second epoch then trains the discriminator alone and has no reconstruction loss to show."""
    history = Trainer(tiny.model(), TrainingConfig(epochs=2, batch_size=16), progress=True).fit(tiny.images(5))
    assert "loss_student" in history.epochs[0] and "loss_student" not in history.epochs[1]
    said = capsys.readouterr()
    assert "epoch   2" in said.err and not said.out


def test_images_that_are_not_finite_stop_before_anything_changes():
    model = tiny.model()
    before, images = weights(model), tiny.images(8)
    images[:, :, 5, 7] = math.nan
    with pytest.raises(NonFiniteError, match=r"^the train images hold NaN or infinite pixels; nothing was trained"):
        fit(model, images)
    assert same(before, weights(model))


@pytest.mark.parametrize(
    ("tensor", "loss"),
    [
        ("encoder.entry.entry.0.weight", "student"),
        ("teacher.output.weight", "teacher"),
        ("discriminator.output.weight", "real"),
        ("student.memories.0.memory.items", "student"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_update(tensor, loss, value):
    model = tiny.model()
    with torch.no_grad():
        model.get_parameter(tensor).view(-1)[0] = value
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(NonFiniteError, match=rf"^step 0: the {loss} loss is (nan|-?inf); nothing was updated"):
        fit(model, tiny.images(8))
    after = dict(model.named_parameters())
    assert not [name for name in before if not torch.equal(before[name].nan_to_num(9), after[name].nan_to_num(9))]


def test_a_gradient_that_is_not_finite_stops_before_its_update():
    model = tiny.model()
    parameter = model.teacher.up[0].outer[0].weight
    parameter.register_hook(lambda gradient: gradient * math.inf)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(
        NonFiniteError, match=r"^step 0: the gradient of teacher\.up\.0\.outer\.0\.weight is not finite"
    ):
        fit(model, tiny.images(8))
    changed = {name.split(".")[0] for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"discriminator"}, "its own update, with its own finite gradients, comes first"
    assert all(value.requires_grad for value in model.parameters())


def test_a_run_that_stops_so_keeps_its_last_checkpoint(monkeypatch, tmp_path):
    images, options = tiny.images(8), {"epochs": 4, "checkpoint_seconds": 0.0}
    fit(tiny.model(), images, run=tmp_path / "whole", **options)
    real = step_module.reconstruction_loss
    with monkeypatch.context() as patch:
        count = iter(range(100))
        patch.setattr(
            step_module, "reconstruction_loss", lambda *pair: real(*pair) * (math.nan if next(count) >= 5 else 1)
        )
        with pytest.raises(NonFiniteError, match=r"^step 4: the teacher loss is nan"):
            fit(tiny.model(), images, run=tmp_path / "run", **options)
    assert checkpoint.read(tmp_path / "run", "last")[1]["progress"]["step"] == 4
    Model.load(tmp_path / "run")
    assert len(tiny.metrics(tmp_path / "run")) == 2
    fit(tiny.model(7), images, run=tmp_path / "run", resume=True, **options)
    tiny.assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_statistics_that_are_not_finite_are_not_trained_on(monkeypatch):
    """The iteration that was stopped had measured them; all scores would be NaN from there on."""
    model, real = tiny.model(), step_module.augment
    before = weights(model)
    with monkeypatch.context() as patch:
        patch.setattr(step_module, "augment", lambda images, **options: real(images, **options) * math.nan)
        trainer = Trainer(model, TrainingConfig(epochs=1, batch_size=4))
        with pytest.raises(NonFiniteError, match=r"^step 0: the"):
            trainer.fit(tiny.images(4))
    with pytest.raises(NonFiniteError, match=r"^the model's encoder\.entry\.entry\.1\.running_mean is not finite"):
        trainer.fit(tiny.images(4))
    model.load_state_dict(before)
    trainer.fit(tiny.images(4))
    other = tiny.model()
    fit(other, tiny.images(4))
    assert same(weights(model), weights(other))


def test_bfloat16_is_autocast():
    model = tiny.model(memory="queue")
    kinds = set()
    model.student.up[0].entry[0].register_forward_hook(
        lambda module, _, output: kinds.add(output.dtype) if module.training else None
    )
    history = fit(model, tiny.images(8), tiny.images(2, 1), precision="bfloat16")
    assert kinds == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(math.isfinite(value) for value in history.epochs[0].values())


def test_tensorboard_is_an_extra(monkeypatch, tmp_path):
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


@pytest.mark.parametrize(
    ("images", "val", "options", "message"),
    [
        (torch.zeros(4, 1, 32, 32), None, {}, "train images must be 48 x 48 pixels, as the model's, got 32 x 32"),
        (torch.zeros(4, 1, 48, 48), torch.zeros(2, 1, 48, 32), {}, "val images must be 48 x 48"),
        (torch.zeros(1, 1, 48, 48), None, {}, "at least 2 images, got 1"),
        (torch.zeros(4, 3, 48, 48), None, {}, r"float \[n, 1, H, W\], got torch.float32 \[4, 3, 48, 48\]"),
        (torch.zeros(4, 1, 48, 48, dtype=torch.uint8), None, {}, "must be float"),
        (torch.zeros(4, 1, 48, 48), None, {"criterion": "reconstruction"}, "needs normal validation images"),
        (
            torch.zeros(4, 1, 48, 48),
            torch.zeros(2, 1, 48, 48),
            {"criterion": "auc"},
            "needs normal and abnormal validation images, got 2 normal and 0 abnormal",
        ),
    ],
)
def test_images_and_criteria_that_do_not_fit_are_refused(images, val, options, message):
    with pytest.raises(ValueError, match=message):
        fit(tiny.model(), images, val, **options)


def test_losses_are_an_epochs_means(monkeypatch):
    def iterate(self, images, with_generator):
        number = self._number.item()
        self._sums += torch.tensor([number, 0, 10 * number if with_generator else 0, 0, 0, 0])

    monkeypatch.setattr(TrainingStep, "_iterate", iterate)
    first, second = fit(tiny.model(), tiny.images(12), epochs=2).epochs
    assert (first["loss_real"], first["loss_student"]) == (1.0, 10.0)
    assert (second["loss_real"], second["loss_student"]) == (4.0, 40.0)


def test_history_is_plain_values(tmp_path):
    history = fit(tiny.model(), tiny.images(8), tiny.images(2, 1), run=tmp_path / "run", epochs=2)
    assert json.loads(json.dumps(history.epochs)) == history.epochs
    assert copy.deepcopy(history) == history and not history.interrupted
    assert [epoch["step"] for epoch in history.epochs] == [2, 4]

"""Values that are not finite: where they are detected, what the message names, and that nothing is updated."""

import math

import pytest
import tiny
import torch

from simsid import Model, Trainer, TrainingConfig, checkpoint
from simsid.distributed import ProcessGroup
from simsid.errors import NonFiniteError
from simsid.training import step as step_module
from simsid.training.guard import NonFiniteGuard, check_finite
from simsid.training.step import TrainingStep


def fit(model, images, val=None, run=None, resume=False, **options):
    trainer = Trainer(model, TrainingConfig(**{"batch_size": 4, "epochs": 1, **options}), run=run)
    return trainer.fit(images, val, resume=resume)


def copies(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def changed(before, model):
    """Return the names of the parameters that have other values than before; NaN equals NaN."""
    now = dict(model.named_parameters())
    return [name for name, value in before.items() if not torch.equal(value.nan_to_num(9), now[name].nan_to_num(9))]


def test_guard_remembers_the_first_problem_only():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.zeros(2)
    guard = NonFiniteGuard({"weight": weight}, 2, ProcessGroup())
    guard.inspect({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, [weight])
    guard.check()
    assert guard.flag == 0
    for iteration, loss in ((4, torch.nan), (5, torch.inf)):
        guard.iteration.fill_(iteration)
        guard.inspect({"a": torch.tensor(loss)}, [weight])
    assert guard.flag == 1
    with pytest.raises(NonFiniteError, match=r"^step 4: the a loss is nan; nothing was updated with it$"):
        guard.check()


def test_check_finite_names_the_first_tensor():
    check_finite({}, "the model's")
    check_finite({"a": torch.zeros(2), "count": torch.tensor(3)}, "the model's")
    with pytest.raises(NonFiniteError, match=r"^the model's b is not finite"):
        check_finite(
            {"a": torch.zeros(2), "b": torch.tensor([0, math.inf]), "c": torch.tensor(math.nan)}, "the model's"
        )


@pytest.mark.parametrize("part", ["train", "val"])
def test_nonfinite_pixels_are_refused_before_training(part):
    model, images = tiny.model(), {"train": tiny.images(8), "val": tiny.images(3, 1)}
    before = copies(model)
    images[part][:, :, 5, 7] = math.nan
    with pytest.raises(NonFiniteError, match=f"^{part} "):
        fit(model, images["train"], images["val"])
    assert not changed(before, model)


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
def test_nonfinite_loss_stops_before_the_update(tensor, loss, value):
    model = tiny.model()
    with torch.no_grad():
        model.get_parameter(tensor).view(-1)[0] = value
    before = copies(model)
    with pytest.raises(NonFiniteError, match=rf"^step 0: the {loss} loss is (nan|-?inf); nothing was updated"):
        fit(model, tiny.images(4))
    assert not changed(before, model)


def test_nonfinite_gradient_stops_before_its_update():
    model = tiny.model()
    parameter = model.teacher.up[0].outer[0].weight
    parameter.register_hook(lambda gradient: gradient * math.inf)
    before = copies(model)
    message = r"^step 0: the gradient of teacher\.up\.0\.outer\.0\.weight is not finite"
    with pytest.raises(NonFiniteError, match=message):
        fit(model, tiny.images(4))
    sides = {name.split(".")[0] for name in changed(before, model)}
    assert sides == {"discriminator"}, "its own update, with finite gradients, comes first"
    assert all(value.requires_grad for value in model.parameters())


def test_later_iterations_change_nothing_until_the_host_checks(monkeypatch):
    """On a GPU the host learns of it later; the iterations until then must change no weight."""
    monkeypatch.setattr(TrainingStep, "check", lambda self: None)
    config = TrainingConfig(batch_size=4, learning_rate=1e-3)
    step = TrainingStep(tiny.model(memory="queue").train(), config)
    images = tiny.images(4, 9)
    for number in range(4):
        if number == 1:
            before = copies(step.model)
            items = step.model.queue.items.clone()
            entries = list(step.optimizers["generator"].state.values())
            moments = [value.clone() for entry in entries for value in entry.values()]
        step(images * torch.inf if number == 1 else images, number)
    after = [value for entry in entries for value in entry.values()]
    assert not changed(before, step.model) and torch.equal(items, step.model.queue.items)
    assert all(map(torch.equal, moments, after))
    assert {entry["step"].item() for entry in step.optimizers["discriminator"].state.values()} == {1}
    monkeypatch.undo()
    with pytest.raises(NonFiniteError, match=r"^step 1: the real loss is nan"):
        step.means()


def test_stopped_run_keeps_its_last_checkpoint_and_resumes(monkeypatch, tmp_path):
    images, options = tiny.images(8), {"epochs": 3, "checkpoint_seconds": 0.0}
    fit(tiny.model(), images, run=tmp_path / "uninterrupted", **options)
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
    tiny.assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")


def test_nonfinite_statistics_are_refused_at_the_start(monkeypatch):
    """The stopped iteration has updated them already; every score would be NaN from there on."""
    model, real = tiny.model(), step_module.augment
    before = {name: value.clone() for name, value in checkpoint.tensors(model).items()}
    with monkeypatch.context() as patch:
        patch.setattr(step_module, "augment", lambda images, **options: real(images, **options) * math.nan)
        trainer = Trainer(model, TrainingConfig(epochs=1, batch_size=4))
        with pytest.raises(NonFiniteError, match=r"^step 0: the"):
            trainer.fit(tiny.images(4))
    with pytest.raises(NonFiniteError, match=r"^the model's encoder\.entry\.entry\.1\.running_mean is not finite"):
        trainer.fit(tiny.images(4))
    model.load_state_dict({**model.state_dict(), **before})
    trainer.fit(tiny.images(4))
    other = tiny.model()
    fit(other, tiny.images(4))
    assert not changed(copies(other), model)


@pytest.mark.parametrize("saves", [True, False], ids=["at the next save", "at the end of the epoch"])
def test_infinite_running_variance_is_found_at(saves, monkeypatch, tmp_path):
    """It leaves every loss finite, because training normalizes with the batch's own statistics."""
    real = TrainingStep.__call__

    def step(self, images, number):
        real(self, images, number)
        if number == 1:
            self.model.student.up[0].entry[1].running_var[0] = math.inf

    monkeypatch.setattr(TrainingStep, "__call__", step)
    seconds = 0.0 if saves else 1e6
    with pytest.raises(NonFiniteError, match=r"^the model's student\.up\.0\.entry\.1\.running_var is not finite"):
        fit(tiny.model(), tiny.images(12), run=tmp_path / "run", epochs=9, checkpoint_seconds=seconds)
    if saves:
        assert checkpoint.read(tmp_path / "run", "last")[1]["progress"]["step"] == 1
    assert not (tmp_path / "run" / "model.json").exists()

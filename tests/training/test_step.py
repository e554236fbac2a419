"""One iteration, however it is executed: eagerly, compiled, or recorded and replayed."""

import functools

import nvtx
import pytest
import tiny
import torch

from simsid import TrainingConfig, cuda_graph
from simsid.errors import NonFiniteError
from simsid.training.step import LOSSES, TrainingStep

CHANGES = [{}, {"memory": "queue", "rho": 0.7, "dropout": 0.3}, {"distillation": False}, {"pixel_inpainting": 0.25}]


def train(steps=4, device="cpu", seed=0, changes=(), **options):
    """Run some iterations; returns the step with its model in the state they leave."""
    config = TrainingConfig(batch_size=4, learning_rate=1e-3, **options)
    step = TrainingStep(tiny.model(**dict(changes)).to(device).train(), config)
    for number in range(steps):
        step(tiny.images(4, seed + number).to(device), number)
    return step


def state(step):
    """Everything that the next iteration depends on, by name."""
    names = {parameter: name for name, parameter in step.model.named_parameters()}
    moments = {
        f"{side} {key} {names[parameter]}": value
        for side, optimizer in step.optimizers.items()
        for parameter, entry in optimizer.state.items()
        for key, value in entry.items()
    }
    return {**step.model.state_dict(), **moments}


def assert_close(one, other, tolerance):
    """Tensor by tensor, relative to the largest value; Adam turns rounding around a zero gradient into full steps."""
    assert one.keys() == other.keys() and len(one) > 100
    apart = {}
    for name, value in one.items():
        mine, theirs = value.double().cpu(), other[name].double().cpu()
        apart[name] = (mine - theirs).abs().mean() / theirs.abs().mean().clamp_min(1e-6)
    worst = sorted(apart, key=apart.get)[-3:]
    share = sum(value < tolerance for value in apart.values()) / len(apart)
    assert share > 0.9, [(name, apart[name].item()) for name in worst]


class Rehearsed(cuda_graph.Replay):
    """Stands for a recording where there is no GPU: rehearses, puts back, and then runs the work itself."""

    made = 0

    def __init__(self, work, inputs, *, between, share):
        Rehearsed.made += 1
        assert (share is None) == (Rehearsed.made == 1)
        self.inputs, self.work = [tensor.clone() for tensor in inputs], work
        for _ in range(cuda_graph.REHEARSALS):
            work(*self.inputs)
        between()

    def __call__(self, *inputs):
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.work(*self.inputs)


@pytest.mark.parametrize("changes", CHANGES)
def test_rehearsals_leave_no_trace(monkeypatch, changes):
    """Recording rehearses each kind of iteration; weights, moments, statistics, queue and sums are as without it."""
    eager = train(5, changes=changes)
    monkeypatch.setattr(cuda_graph, "record", Rehearsed)
    monkeypatch.setattr(Rehearsed, "made", 0)
    real = TrainingStep.__init__

    def recording(self, *arguments):
        real(self, *arguments)
        self._record = True

    monkeypatch.setattr(TrainingStep, "__init__", recording)
    recorded = train(5, changes=changes)
    assert Rehearsed.made == 2
    one, other = state(eager), state(recorded)
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]
    assert eager.means() == recorded.means() and eager.counts == recorded.counts


def test_what_cannot_be_recorded_runs_eagerly(monkeypatch):
    def refuse(work, inputs, **_):
        work(*inputs)
        raise RuntimeError("operation not permitted when stream is capturing")

    eager = train(3)
    monkeypatch.setattr(cuda_graph, "record", refuse)
    step = TrainingStep(tiny.model().train(), TrainingConfig(batch_size=4, learning_rate=1e-3))
    step._record = True
    with pytest.warns(UserWarning, match="runs eagerly: operation not permitted"):
        for number in range(3):
            step(tiny.images(4, number), number)
    one, other = state(eager), state(step)
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def test_the_compiled_step_is_the_eager_one(monkeypatch):
    """Inductor would compile C++ for minutes; what it is given, forward and backward, is the same."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled, eager = (train(3, compile=compile, translate=0.0, scale=0.0) for compile in (True, False))
    torch._dynamo.reset()
    assert compiled.means() == pytest.approx(eager.means(), rel=1e-3)
    assert_close(state(compiled), state(eager), 1e-2)


def test_losses_are_summed_and_go_on():
    step = train(3)
    assert step.counts == {"real": 3, "fake": 3, "student": 2, "generator": 2, "teacher": 2, "distillation": 2}
    sums, counts, means = step.sums(), step.counts, step.means()
    assert list(means) == list(LOSSES) and means["student"] == sums["student"] / 2
    step.reset()
    assert step.means() == {} and step.sums() == {}
    step.reset(sums, counts)
    assert step.means() == means
    assert "teacher" not in train(1, changes={"distillation": False}).means()


def test_after_something_not_finite_nothing_moves(monkeypatch):
    """On a GPU the host hears of it later; the iterations until then must change no weight."""
    monkeypatch.setattr(TrainingStep, "check", lambda self: None)
    step = train(2, changes={"memory": "queue"})
    before = {name: value.clone() for name, value in state(step).items()}
    images = tiny.images(4, 9)
    for number in range(2, 7):
        step(images * torch.inf if number == 3 else images, number)
        if number == 2:
            before = {name: value.clone() for name, value in state(step).items()}
    monkeypatch.undo()
    with pytest.raises(NonFiniteError, match=r"^step 3: the real loss is nan"):
        step.means()
    after = state(step)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    changed = [name for name in before if not name.endswith(statistics) and not torch.equal(before[name], after[name])]
    assert not changed


def test_every_stage_is_a_range(monkeypatch):
    """What `nsys` shows of an iteration and of scoring: each stage once, nested as the work is."""
    seen, open_ranges = [], []

    class Domain:
        def get_event_attributes(self, message):
            return message

        def push_range(self, name):
            open_ranges.append(name)
            seen.append("/".join(open_ranges))

        def pop_range(self):
            open_ranges.pop()

    monkeypatch.setattr(nvtx, "get_domain", {"simsid": Domain()}.__getitem__)
    step = train(2)
    assert not open_ranges and seen[0] == "augmentation"
    both, alone = seen[1 : seen.index("augmentation", 1)], seen[seen.index("augmentation", 1) + 1 :]
    stages = [name.split("/", 1)[1] for name in both[1:]]
    top = [name for name in stages if "/" not in name]
    assert top[:5] == ["encoder", "student", "teacher", "distillation", "losses"]
    assert top[5:8] == ["discriminator", "discriminator backward", "discriminator optimizer"]
    assert top[8:] == ["discriminator", "generator backward", "generator optimizer"]
    assert {"student/in-painting/in-painting memory", "student/decoder memory 0", "student/decoder memory 1"} < {
        *stages
    }
    assert alone[0] == "iteration of the discriminator" and not [name for name in alone if "teacher" in name]
    seen.clear()
    step.model.eval().signals(tiny.images(1))
    assert [name for name in seen if "/" not in name] == ["encoder", "student", "signals"]

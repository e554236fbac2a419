"""One iteration of training: eager, compiled, and captured as a CUDA graph."""

import functools

import nvtx
import pytest
import tiny
import torch

from simsid import TrainingConfig, cuda_graph
from simsid.errors import DeviceMemoryError
from simsid.training.step import LOSSES, TrainingStep

CHANGES = {
    "simsid": {},
    "queue and dropout": {"memory": "queue", "rho": 0.7, "dropout": 0.3},
    "no teacher": {"distillation": False},
    "blank patches": {"pixel_inpainting": 0.25},
}
each_model = pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)


def train(steps=4, device="cpu", seed=0, changes=(), **options):
    """Run some iterations and return the step."""
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
    return {**dict(step.model.named_parameters()), **dict(step.model.named_buffers()), **moments}


def different(one, other):
    """Return the names of the tensors that are not bitwise equal."""
    assert one.keys() == other.keys() and len(one) > 100
    return [name for name in one if not torch.equal(one[name], other[name])]


def assert_close(one, other, tolerance):
    """Compare means, not elements: Adam turns the rounding of a zero gradient into a full step."""
    assert one.keys() == other.keys() and len(one) > 100
    errors = {}
    for name, value in one.items():
        actual, expected = value.double().cpu(), other[name].double().cpu()
        errors[name] = ((actual - expected).abs().mean() / expected.abs().mean().clamp_min(1e-6)).item()
    worst = sorted(errors, key=errors.get)[-3:]
    fraction = sum(error < tolerance for error in errors.values()) / len(errors)
    assert fraction > 0.9, [(name, errors[name]) for name in worst]


class WarmedUp(cuda_graph.CapturedGraph):
    """Replaces a captured graph where there is no GPU: it warms up and restores, then runs the work eagerly."""

    count = 0

    def __init__(self, work, inputs, *, after_warmup, share_memory_with):
        WarmedUp.count += 1
        assert (share_memory_with is None) == (WarmedUp.count == 1)
        self.inputs, self.work = [tensor.clone() for tensor in inputs], work
        for _ in range(cuda_graph.WARMUPS):
            work(*self.inputs)
        after_warmup()

    def __call__(self, *inputs):
        for target, source in zip(self.inputs, inputs, strict=True):
            target.copy_(source)
        self.work(*self.inputs)


def capturing(changes=()):
    """Return a step on a CPU that captures its iterations as one on a GPU does."""
    config = TrainingConfig(batch_size=4, learning_rate=1e-3)
    step = TrainingStep(tiny.model(**dict(changes)).train(), config)
    step._use_graph = True
    return step


@each_model
def test_warmup_before_capture_leaves_no_trace(monkeypatch, changes):
    """Weights, moments, statistics, queue and sums are bitwise those of a training without warm-up runs."""
    eager, captured = train(3, changes=changes), capturing(changes)
    monkeypatch.setattr(cuda_graph, "capture", WarmedUp)
    monkeypatch.setattr(WarmedUp, "count", 0)
    for number in range(3):
        captured(tiny.images(4, number), number)
    assert WarmedUp.count == 2
    assert not different(state(eager), state(captured))
    assert eager.means() == captured.means() and eager.counts == captured.counts


def test_failed_capture_falls_back_to_eager(monkeypatch):
    def fail(work, inputs, **_):
        work(*inputs)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graph, "capture", fail)
    step = capturing()
    with pytest.warns(UserWarning, match="runs eagerly: operation not permitted"):
        for number in range(3):
            step(tiny.images(4, number), number)
    assert not different(state(train(3)), state(step))


def test_compiled_step_equals_eager(monkeypatch):
    """With the backend `aot_eager`: the same traced forward and backward passes, without minutes of C++."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    # Tracing takes seconds, so one level; two iterations run all that is compiled: with and without the generator.
    results = []
    for compiled in (True, False):
        config = TrainingConfig(batch_size=4, learning_rate=1e-3, translate=0.0, scale=0.0, compile=compiled)
        results.append(TrainingStep(tiny.model(**tiny.ONE_LEVEL, discriminator_width=16).train(), config))
        for number in range(2):
            results[-1](tiny.images(4, number)[:, :, :36, :36], number)
    compiled, eager = results
    torch._dynamo.reset()
    assert compiled.means() == pytest.approx(eager.means(), rel=1e-3)
    assert_close(state(compiled), state(eager), 1e-2)


def test_losses_are_averaged_and_resume_from_sums():
    step = train(3)
    assert step.counts == {"real": 3, "fake": 3, "student": 2, "adversarial": 2, "teacher": 2, "distillation": 2}
    sums, counts, means = step.sums(), step.counts, step.means()
    assert list(means) == [name for name in LOSSES if name != "divergence"] and means["student"] == sums["student"] / 2
    step.reset()
    assert step.means() == {} and step.sums() == {}
    step.reset(sums, counts)
    assert step.means() == means
    assert "teacher" not in train(1, changes={"distillation": False}).means()


def test_out_of_memory_is_one_sentence_with_the_remedy(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    step = train(0)
    monkeypatch.setattr(step, "_iterate", fail)
    message = r"ran out of memory in an iteration of 4 images, 48 x 48 pixels; choose a batch_size below 4, precision="
    with pytest.raises(DeviceMemoryError, match=message):
        step(tiny.images(4), 0)


def test_every_stage_is_an_nvtx_range(monkeypatch):
    """The ranges that `nsys` shows of an iteration and of scoring: each stage once, nested like the calls."""
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

"""Training steps that the GPU tests share."""

import tiny
import torch

from simsid import Config, Model, TrainingConfig
from simsid.training.step import TrainingStep

CHANGES = {
    "simsid": {},
    "squid": {"memory": "queue", "rho": 0.7, "dropout": 0.3},
    "without teacher": {"distillation": False},
    "pixel in-painting": {"pixel_inpainting": 0.25},
}
METHODS = {"simsid": Config.simsid, "squid": Config.squid}


def smooth_images(count, size):
    """Return images `[count, 1, size, size]` in -1..1, smooth like radiographs."""
    coarse = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    fine = torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(2))
    return torch.tanh(torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic") + 0.1 * fine)


def train_tiny(steps, device, changes=(), **options):
    """Run iterations of a tiny model; returns the step with its model in the state they leave."""
    config = TrainingConfig(batch_size=4, learning_rate=1e-3, **options)
    step = TrainingStep(tiny.model(**dict(changes)).to(device).train(), config)
    for number in range(steps):
        step(tiny.images(4, number).to(device), number)
    return step


def published_step(method, device, small, *, fused="auto", **options):
    """Return the step of an untrained model of the published size (tiny where `small`), the same weights every time."""
    torch.manual_seed(0)
    model = Model(METHODS[method](**tiny.SIZES if small else {}), fused=fused)
    return TrainingStep(model.to(device).train(), TrainingConfig(**options))


def train_published(method, device, small, steps, **options):
    """Run iterations of the published size; returns the step."""
    step, batch = published_step(method, device, small, **options), 4 if small else 16
    images = smooth_images(4 * batch, step.model.config.image_size).to(device)
    for number in range(steps):
        step(images[number % 4 * batch :][:batch], number)
    return step


def captured(step):
    """Return whether both kinds of iteration were captured as CUDA graphs."""
    return set(step._graphs) == {True, False}


def state(step):
    """Return everything that the next iteration depends on, by name."""
    names = {parameter: name for name, parameter in step.model.named_parameters()}
    moments = {
        f"{side} {key} {names[parameter]}": value
        for side, optimizer in step.optimizers.items()
        for parameter, entry in optimizer.state.items()
        for key, value in entry.items()
    }
    return {**step.model.state_dict(), **moments}


def assert_same(one, other):
    """Two steps hold the same state bit for bit."""
    mine, theirs = state(one), state(other)
    assert mine.keys() == theirs.keys() and len(mine) > 100
    assert not [name for name in mine if not torch.equal(mine[name], theirs[name])]


def assert_close(one, other, tolerance):
    """Nine in ten tensors agree on average: Adam turns rounding around a zero gradient into full steps."""
    mine, theirs = state(one), state(other)
    assert mine.keys() == theirs.keys() and len(mine) > 100
    apart = {}
    for name, value in mine.items():
        reference = theirs[name].double().cpu()
        apart[name] = (value.double().cpu() - reference).abs().mean() / reference.abs().mean().clamp_min(1e-6)
    worst = sorted(apart, key=apart.get)[-3:]
    fraction = sum(value < tolerance for value in apart.values()) / len(apart)
    assert fraction > 0.9, [(name, apart[name].item()) for name in worst]

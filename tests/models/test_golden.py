"""The model against numbers computed by the authors' released code, read through the converter."""

import json

import numpy as np
import pytest
import torch
from shared import GOLDEN, needs_golden

from simsid.config import TrainingConfig
from simsid.models import losses
from simsid.models.model import Model
from simsid.models.released import ITEMS, PACKED, convert, renamed_names

pytestmark = needs_golden
FORWARD, GRADIENT = 1e-4, 2e-2


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "released_p4_subpatch.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind in "fi"}


def build(golden, **choices) -> Model:
    state = {name.removeprefix("state."): value for name, value in golden.items() if name.startswith("state.")}
    parts = [
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for prefix in ("generator.", "discriminator.")
    ]
    return convert(*parts, **choices)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest absolute value."""
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def generator_loss(model: Model, images: torch.Tensor):
    found, weights = model(images), TrainingConfig()
    loss = (
        weights.teacher_weight * losses.reconstruction_loss(images, found.teacher)
        + weights.student_weight * losses.reconstruction_loss(images, found.student)
        + weights.distillation_weight * found.distillation
        + weights.adversarial_weight * losses.adversarial_loss(model.discriminator(found.student), real=True)
    )
    return loss, found


def test_inference(golden):
    model = build(golden)
    with torch.no_grad():
        found = model(golden["input"], teacher=True)
        logits = model.discriminator(found.student)
        real = model.discriminator(golden["input"])
    assert error(found.student, golden["eval.reconstruction"]) < FORWARD
    assert error(found.teacher, golden["eval.teacher_reconstruction"]) < FORWARD
    assert error(found.distillation, golden["eval.distillation_loss"]) < FORWARD
    assert error(logits, golden["eval.logit"][:, 0]) < FORWARD
    assert error(real, golden["eval.logit_real"][:, 0]) < FORWARD


def test_training(golden):
    model = build(golden).train()
    loss, found = generator_loss(model, golden["input"])
    loss.backward()
    assert error(loss, golden["train.generator_loss"]) < FORWARD
    assert error(found.student, golden["train.reconstruction"]) < FORWARD
    assert_gradients(model, golden)


def assert_gradients(model: Model, golden: dict[str, torch.Tensor]) -> None:
    """Compare every gradient that the golden file holds."""
    own = {name: parameter.grad.cpu() for name, parameter in model.named_parameters() if parameter.grad is not None}
    wanted = {name.removeprefix("grad."): value for name, value in golden.items() if name.startswith("grad.")}
    assert len(wanted) >= 15
    names = renamed_names(wanted)
    for theirs, want in wanted.items():
        if match := PACKED.fullmatch(theirs):
            mixing = "student.inpainting.mixing"
            got = torch.cat([own[f"{mixing}.query.{match[1]}"], own[f"{mixing}.key_value.{match[1]}"]])
        elif match := ITEMS.fullmatch(theirs):
            block = "student.inpainting" if match[2] is None else f"student.memories.{match[2]}"
            got = own[f"{block}.memory.items"][int(match[3])]
        else:
            got = own[names[theirs]]
        if theirs == "generator.teacher_ups.0.conv.conv1.0.bias":
            assert (got - want).abs().max() < 1e-6  # an exact zero in both, up to rounding
        else:
            assert error(got, want) < (FORWARD if "out_conv" in theirs else GRADIENT), theirs


@pytest.mark.parametrize(
    ("change", "at_least"),
    [({"threshold": "inclusive"}, 0.05), ({"border": "mask"}, 0.05), ({"decoder_memory": "patch"}, None)],
)
def test_wrong_readings_show(golden, change, at_least):
    """The comparison can fail: another reading of the papers misses the numbers visibly, or does not fit the shapes."""
    if at_least is None:
        with pytest.raises(ValueError, match="must have shape"):
            build(golden, **change)
        return
    with torch.no_grad():
        found = build(golden, **change)(golden["input"])
    assert error(found.student, golden["eval.reconstruction"]) > at_least


def test_published_names():
    """Every name and shape of the published ZhangLab configuration finds its place."""
    shapes = json.loads((GOLDEN / "released_names.json").read_text())
    parts = [
        {name.removeprefix(prefix): torch.zeros(shape) for name, shape in shapes.items() if name.startswith(prefix)}
        for prefix in ("generator.", "discriminator.")
    ]
    config = convert(*parts, memory="queue", rho=0.95).config
    assert (config.patches, config.width, config.levels, config.image_size) == (2, 32, 4, 128)
    assert (config.items, config.decoder_items, config.skip_levels) == (200, 200, 2)

"""Every preset and ablation by name trains for an epoch, and what the baselines' choices change in training."""

import pytest
import tiny
import torch

from simsid import Trainer, TrainingConfig
from simsid.config import ABLATIONS, PRESETS
from simsid.data import as_image_set
from simsid.models.presets import preset, seeded_model
from simsid.training import state
from simsid.training.run_folder import RunFolder
from simsid.training.step import TrainingStep

SIZES = {**tiny.SIZES, "image_size": 48}
LOSSES = {"real", "fake", "student"}


def named(name, **changes):
    """An untrained model of a preset or ablation at the tests' sizes; three patches stay three."""
    config = preset(name).config()
    return seeded_model(name, config.replace(**{**SIZES, "patches": min(config.patches, 3), **changes}), 0, "cpu")


@pytest.mark.parametrize("name", [*PRESETS, *ABLATIONS])
def test_every_preset_and_ablation_trains_for_an_epoch_and_scores(name):
    model = named(name)
    config, before = model.config, {key: value.clone() for key, value in model.state_dict().items()}
    images, val = tiny.images(8), tiny.images(3, 1)
    (epoch,) = Trainer(model, TrainingConfig(epochs=1, batch_size=4)).fit(images, val).epochs
    expected = LOSSES | ({"adversarial"} if config.adversarial else set())
    expected |= {"teacher", "distillation"} if config.distillation else set()
    expected |= {"divergence"} if config.variational else set()
    assert {key.removeprefix("loss_") for key in epoch if key.startswith("loss_")} == expected
    after = model.state_dict()
    for part in ("encoder.entry.entry.0.weight", "student.output.weight", "discriminator.convolutions.1.weight"):
        assert not torch.equal(after[part], before[part]), part
    memories = [key for key in after if key.endswith("memory.items")]
    assert all(not torch.equal(after[key], before[key]) for key in memories)
    assert bool(memories) == (config.inpainting != "none" or config.decoder_memories > 0)
    scores = model.score(tiny.images(2, 2))
    assert model.signal == config.signal and scores.isfinite().all() and len(model.calibration.holdout) > 1


def test_variational_autoencoder_samples_in_training_and_takes_the_mean_in_inference():
    model, images = named("vae"), tiny.images(2)
    assert model.student.inpainting is None and len(model.student.memories) == 0
    first, second = (model.train()(images) for _ in range(2))
    assert not torch.equal(first.student, second.student), "each pass draws its own noise"
    assert torch.equal(first.divergence, second.divergence), "the distribution itself is not random"
    assert torch.equal(model.eval()(images).student, model(images).student)


def test_divergence_is_that_of_normal_distributions_per_pixel():
    model, images = named("vae").eval(), tiny.images(2)
    seen = []
    model.student.bottleneck.moments.register_forward_hook(lambda _, __, output: seen.append(output))
    divergence = model(images).divergence
    mean, log_variance = seen[0].double().chunk(2, dim=1)
    own = torch.distributions.Normal(mean, (log_variance / 2).exp())
    standard = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    expected = torch.distributions.kl_divergence(own, standard).sum() / images.numel()
    torch.testing.assert_close(divergence.double(), expected, rtol=1e-4, atol=1e-8)


def test_divergence_weight_pulls_the_features_towards_the_standard_normal():
    images = tiny.images(8)
    ends = {}
    for weight in (0.0, 100.0):
        model = named("vae")
        config = TrainingConfig(epochs=3, batch_size=4, learning_rate=1e-2, divergence_weight=weight)
        Trainer(model, config).fit(images)
        ends[weight] = model(images).divergence.item()
    assert ends[100.0] < 0.8 * ends[0.0]


def test_a_baseline_without_adversarial_loss_is_not_moved_by_the_discriminator():
    """The generator ends the same whatever the discriminator's weights are; SimSID's does not."""
    for name, same in (("autoencoder", True), ("simsid", False)):
        outputs = []
        for scale in (1.0, -3.0):
            model = named(name).train()
            with torch.no_grad():
                model.discriminator.get_parameter("convolutions.1.weight").mul_(scale)
            TrainingStep(model, TrainingConfig(batch_size=4))(tiny.images(4), 0)
            outputs.append(model.state_dict()["student.output.weight"].clone())
        assert torch.equal(*outputs) == same, name


def test_pixel_inpainting_is_trained_to_rebuild_the_patches_that_it_does_not_see():
    """With every patch blanked the network sees nothing, and its loss is still the distance from the whole image."""
    model, images = named("pixel_inpainting", pixel_inpainting=1.0).train(), tiny.images(4)
    step = TrainingStep(model, TrainingConfig(batch_size=4, translate=0.0, scale=0.0))
    shown = []
    hook = model.student.register_forward_hook(lambda _, __, output: shown.append(output.images.detach()))
    step(images, 0)
    hook.remove()
    expected = (images - shown[0]).square().mean()
    assert expected > 0.2 and step.means()["student"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("decay", "items", "others"),
    [("coupled", "full step", "full step"), ("except_items", "kept", "full step"), ("decoupled", "shrunk", "shrunk")],
)
def test_decay_of_weights_that_no_loss_moves(decay, items, others):
    """Adam scales a term of the gradient to full steps, which is what erases seldom used memory items."""
    rate, weight_decay = 1e-2, 0.1
    losses = {f"{name}_weight": 0.0 for name in ("teacher", "student", "distillation", "adversarial")}
    config = TrainingConfig(batch_size=4, decay=decay, generator_weight_decay=weight_decay, **losses)
    model = named("simsid").train()
    names = {"student.inpainting.memory.items": items, "student.output.weight": others}
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    step = TrainingStep(model, config)
    step.set_learning_rate(rate)
    step(tiny.images(4), 0)
    for name, expected in names.items():
        change = {
            "full step": before[name] - rate * before[name].sign(),
            "kept": before[name],
            "shrunk": before[name] * (1 - rate * weight_decay),
        }[expected]
        # Adam's epsilon shortens the step of the smallest weights.
        tolerance = 1e-3 if expected == "full step" else 1e-7
        torch.testing.assert_close(model.get_parameter(name).detach(), change, rtol=0, atol=tolerance)


def test_state_of_optimizers_with_several_groups_is_restored(tmp_path):
    config = TrainingConfig(batch_size=4, decay="except_items", learning_rate=1e-3)
    steps = [TrainingStep(named("simsid").train(), config) for _ in range(2)]
    steps[0](tiny.images(4), 0)
    request = state.make_request(steps[0].model, config, as_image_set(tiny.images(4)), None)
    with RunFolder(tmp_path / "run") as folder:
        state.save(folder, steps[0], state.Progress(step=1), request)
        state.restore(state.read(folder, request), steps[1], "last.json")
    for step in steps:
        step(tiny.images(4, 1), 2)
    weights = [step.model.state_dict() for step in steps]
    assert not [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]

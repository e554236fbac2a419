"""The discriminator: its two kinds of statistics, and its layers."""

import pytest
import torch
from torch.nn import functional as F

from simsid.models.discriminator import Discriminator


def worn(image_size: int) -> Discriminator:
    """A discriminator whose norms are not at their initial values."""
    torch.manual_seed(0)
    model = Discriminator(image_size)
    for norm in model.norms:
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
        torch.nn.init.normal_(norm.bias, 0.0, 0.3)
        torch.nn.init.normal_(norm.running_mean, 0.0, 0.1)
        torch.nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return model


def by_hand(model: Discriminator, images: torch.Tensor, training: bool) -> torch.Tensor:
    x = F.leaky_relu(model.convolutions[0](images), 0.2)
    for convolution, norm in zip(model.convolutions[1:], model.norms):
        x = convolution(x)
        mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)) if training else norm_running(norm)
        x = (x - mean[:, None, None]) / torch.sqrt(var + 1e-5)[:, None, None]
        x = F.leaky_relu(x * norm.weight[:, None, None] + norm.bias[:, None, None], 0.2)
    return F.linear(x.flatten(1), model.output.weight, model.output.bias)[:, 0]


def norm_running(norm):
    return norm.running_mean, norm.running_var


@pytest.mark.parametrize("image_size", [33, 48, 64])
def test_layers(image_size):
    model = worn(image_size)
    assert [tuple(c.weight.shape) for c in model.convolutions] == [
        *((16, 1, 5, 5), (32, 16, 5, 5), (64, 32, 5, 5)),
        *((128, 64, 5, 5), (256, 128, 5, 5)),
    ]
    images = torch.randn(2, 1, image_size, image_size)
    for training in (False, True):
        model.train(training)
        with torch.no_grad():
            torch.testing.assert_close(model(images), by_hand(model, images, training), rtol=1e-4, atol=1e-5)


def test_per_image_is_training_mode_at_batch_size_one():
    model, images = worn(64).eval(), torch.randn(3, 1, 64, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        got = model(images, "per_image")
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "nothing changes"
        want = torch.cat([model.train()(image[None]) for image in images])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_per_image_in_training_leaves_the_running_statistics_alone():
    model, images = worn(48).train(), torch.randn(2, 1, 48, 48)
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(images, "per_image")
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    model(images)
    assert not torch.equal(model.norms[0].running_mean, before["norms.0.running_mean"])


def test_running_uses_the_running_statistics():
    model, images = worn(48).eval(), torch.randn(2, 1, 48, 48)
    with torch.no_grad():
        assert not torch.allclose(model(images), model(images, "per_image"))
        torch.testing.assert_close(model(images)[:1], model(images[:1]))


def test_statistics_are_checked():
    with pytest.raises(ValueError, match="statistics must be 'module' or 'per_image', got 'running'"):
        worn(48)(torch.zeros(1, 1, 48, 48), "running")


def test_gradients_reach_every_weight():
    model = worn(48).train()
    model(torch.randn(2, 1, 48, 48)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

"""BatchNorm of maps with few channels: the output, gradients and running statistics are PyTorch's."""

import pytest
import tiny
import torch
from torch import nn

from simsid import TrainingConfig
from simsid.models import batch_norm
from simsid.models.batch_norm import BatchNorm2d
from simsid.training.step import TrainingStep


def maps(shape, dtype, seed=0):
    """A channels-last map whose channels differ in mean and scale."""
    torch.manual_seed(seed)
    channels = torch.arange(1.0, shape[1] + 1)[:, None, None]
    return (torch.randn(shape) * channels + channels).to(dtype).contiguous(memory_format=torch.channels_last)


def trained(kind, x, grad, dtype=torch.float32):
    """Return output, gradients and running statistics after a step in training mode."""
    norm = kind(x.shape[1]).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, x.shape[1]))
        norm.bias.copy_(torch.linspace(-1, 1, x.shape[1]))
    x = x.clone().requires_grad_()
    y = norm(x)
    assert y.dtype == x.dtype
    gradients = torch.autograd.grad(y, (x, norm.weight, norm.bias), grad)
    return [y, *gradients, norm.running_mean, norm.running_var, norm.num_batches_tracked]


@pytest.fixture
def narrow(monkeypatch):
    """Take the path for narrow maps at any size, and count its uses."""
    calls, real = [], batch_norm._NarrowBatchNorm.apply
    monkeypatch.setattr(batch_norm, "LARGE", 2)
    monkeypatch.setattr(batch_norm._NarrowBatchNorm, "apply", lambda *values: calls.append(1) or real(*values))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 8, 5, 7), (2, 1, 4, 4), (1, 15, 1, 3), (4, 3, 6, 1), (2, 4, 1, 2)])
def test_agrees_with_pytorch_in_float64(narrow, shape, dtype):
    x, grad = maps(shape, dtype), maps(shape, dtype, seed=1)
    got, torch_same = trained(BatchNorm2d, x, grad), trained(nn.BatchNorm2d, x, grad)
    exact = trained(nn.BatchNorm2d, x.double(), grad.double(), torch.float64)
    assert len(narrow) == 1
    # Gradients are small differences of terms of these sizes.
    deviation = x.double().var((0, 2, 3), unbiased=False).sqrt().min()
    scales = {"x": 1.5 / deviation * grad.abs().max(), "weight": 3 * grad.abs().sum() / x.shape[1]}
    names = ("y", "x", "weight", "bias", "mean", "var", "count")
    for name, ours, theirs, value in zip(names, got, torch_same, exact, strict=True):
        eps = torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0
        allowed = 2 * (theirs.double() - value).abs().max() + 4 * eps * scales.get(name, value.abs().max())
        assert (ours.double() - value).abs().max() <= allowed, name


def test_large_mean_keeps_the_variance(narrow):
    """The variance is not the difference of two large sums."""
    x = maps((8, 4, 6, 6), torch.float32) + 1e3
    exact = trained(nn.BatchNorm2d, x.double(), torch.ones_like(x).double(), torch.float64)
    torch.testing.assert_close(trained(BatchNorm2d, x, torch.ones_like(x))[5].double(), exact[5], rtol=1e-4, atol=0)


def test_gradient_in_another_layout_gives_the_same(narrow):
    x, grad = maps((3, 8, 5, 7), torch.float32), maps((3, 8, 5, 7), torch.float32, seed=1)
    for one, other in zip(trained(BatchNorm2d, x, grad), trained(BatchNorm2d, x, grad.contiguous())):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "x",
    [
        maps((2, 8, 16, 16), torch.float32),
        maps((8, 16, 64, 64), torch.float32),
        maps((16, 8, 64, 64), torch.float32).contiguous(),
        maps((16, 8, 64, 64), torch.float16),
    ],
    ids=["small", "16 channels", "contiguous", "float16"],
)
def test_other_maps_get_the_bits_of_pytorch(x):
    for one, other in zip(trained(BatchNorm2d, x, x), trained(nn.BatchNorm2d, x, x)):
        assert torch.equal(one, other)


def test_inference_gives_the_bits_of_pytorch():
    x = maps((16, 8, 96, 96), torch.float32)
    assert torch.equal(BatchNorm2d(8).eval()(x), nn.BatchNorm2d(8).eval()(x))


def test_no_gradient_leaves_no_graph_and_updates_the_statistics():
    norm, x = BatchNorm2d(8), maps((16, 8, 96, 96), torch.float32)
    with torch.no_grad():
        assert not norm(x).requires_grad
    assert norm.num_batches_tracked == 1 and norm.running_mean.abs().min() > 0


def test_training_step_equals_the_step_with_pytorchs(narrow, monkeypatch):
    """The activations after it work in place."""
    results = []
    for channels in (16, 0):
        monkeypatch.setattr(batch_norm, "VECTOR", channels)
        step = TrainingStep(tiny.model().train(), TrainingConfig(batch_size=4, precision="float32"))
        step(tiny.images(4), 0)
        results.append(
            {
                **step.means(),
                **{f"norm {i}": x.norm().item() for i, x in enumerate(step.model.buffers()) if x.is_floating_point()},
            }
        )
    assert len(narrow) > 20 and results[0] == pytest.approx(results[1], rel=1e-3)


def test_second_derivative_is_refused(narrow):
    x = maps((2, 4, 3, 3), torch.float32).requires_grad_()
    (grad,) = torch.autograd.grad(BatchNorm2d(4)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()

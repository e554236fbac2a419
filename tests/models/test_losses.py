"""The losses against their equations."""

import math

import pytest
import torch

from simsid.models.losses import adversarial_loss, distillation_loss, reconstruction_loss


def test_distillation_sums_over_blocks_and_detaches_neither():
    student = [torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 1, 8, 8, requires_grad=True)]
    teacher = [torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 1, 8, 8, requires_grad=True)]
    loss = distillation_loss(student, teacher)
    torch.testing.assert_close(loss, sum(((s - t) ** 2).mean() for s, t in zip(student, teacher)))
    loss.backward()
    for s, t in zip(student, teacher):
        torch.testing.assert_close(s.grad, 2 * (s - t).detach() / s.numel())
        torch.testing.assert_close(t.grad, -s.grad)
    with pytest.raises(ValueError):
        distillation_loss(student, teacher[:1])


def test_adversarial_is_binary_cross_entropy():
    logits = torch.tensor([-2.0, 0.5, 3.0])
    softplus = [math.log1p(math.exp(-value)) for value in logits.tolist()]
    assert adversarial_loss(logits, real=True).item() == pytest.approx(sum(softplus) / 3, rel=1e-6)
    softplus = [math.log1p(math.exp(value)) for value in logits.tolist()]
    assert adversarial_loss(logits, real=False).item() == pytest.approx(sum(softplus) / 3, rel=1e-6)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_summed_in_float32_or_better(given, wanted):
    x, y = torch.rand(2, 1, 64, 64).to(given), torch.rand(2, 1, 64, 64).to(given)
    exact = (x.double() - y.double()).square().mean()
    for loss in (reconstruction_loss(x, y), distillation_loss([x], [y])):
        assert loss.dtype == wanted
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    assert adversarial_loss(x.flatten()[:4], real=True).dtype == wanted

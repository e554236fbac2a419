"""The whole model through the fused kernels, once: the same numbers and gradients as through the references."""

import pytest
import torch
from harness import DEVICE, needs_kernels

from simsid.config import Config
from simsid.models.model import Model

TINY = {"image_size": 48, "patches": 3, "levels": 2, "width": 4, "items": 7, "decoder_items": 6, "topk": 2, "heads": 2}


def use(model, backend):
    """Send every op of the model to one backend; returns how many modules there are to send."""
    found = [module for module in model.modules() if hasattr(module, "backend")]
    for module in found:
        module.backend = backend
    return len(found)


@needs_kernels
@pytest.mark.parametrize("choice", [{}, {"border": "mask", "memory": "queue", "threshold": "exclusive"}])
def test_fused_and_reference_models_agree(choice, monkeypatch):
    # The convolutions after a memory would round its last digits up to their third.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model = Model(Config(**TINY, **choice)).to(DEVICE).train()
    images = torch.rand(2, 1, 48, 48).to(DEVICE) * 2 - 1
    results = {}
    for backend in ("torch", "triton"):
        assert use(model, backend) == 5  # the in-painting block, its memory, its attention, two decoder memories
        model.zero_grad()
        found = model(images)
        (found.student.square().mean() + found.distillation + found.teacher.mean()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results[backend] = found, gradients
    (reference, wanted), (fused, got) = results["torch"], results["triton"]
    torch.testing.assert_close(fused.student, reference.student, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused.retrieved, reference.retrieved, rtol=1e-4, atol=1e-5)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = gradient.abs().max().clamp_min(1e-6)
        assert (got[name] - gradient).abs().max() < 2e-3 * scale + 1e-6, name

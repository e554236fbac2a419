"""The whole model on the fused kernels gives the numbers and gradients that it gives on the references."""

import pytest
import torch
from harness import DEVICE, needs_kernels

from simsid.config import Config
from simsid.models.model import Model

TINY = {"image_size": 48, "patches": 3, "levels": 2, "width": 4, "items": 7, "decoder_items": 6, "topk": 2, "heads": 2}


def use(model, backend):
    """Select the backend of every op inside the model; return how many modules have one."""
    modules = [module for module in model.modules() if hasattr(module, "backend") and module is not model]
    for module in modules:
        module.backend = backend
    return len(modules)


@needs_kernels
@pytest.mark.parametrize("choice", [{}, {"border": "mask", "memory": "queue", "threshold": "exclusive"}])
def test_fused_and_reference_models_agree(choice, monkeypatch):
    # With TF32 the convolutions after a memory would amplify its last digits to the third.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model = Model(Config(**TINY, **choice)).to(DEVICE).train()
    images = torch.rand(2, 1, 48, 48).to(DEVICE) * 2 - 1
    results = {}
    for backend in ("torch", "triton"):
        assert use(model, backend) == 5  # the in-painting block, its memory, its attention, two decoder memories
        model.zero_grad()
        output = model(images)
        (output.student.square().mean() + output.distillation + output.teacher.mean()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results[backend] = output, gradients
    (reference, wanted), (fused, got) = results["torch"], results["triton"]
    torch.testing.assert_close(fused.student, reference.student, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused.retrieved, reference.retrieved, rtol=1e-4, atol=1e-5)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = gradient.abs().max().clamp_min(1e-6)
        assert (got[name] - gradient).abs().max() < 2e-3 * scale + 1e-6, name

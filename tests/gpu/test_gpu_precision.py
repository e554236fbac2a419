"""Autocast and TensorFloat-32: what they may change, and what they must leave alone."""

import memory_cases as memory
import pytest
import tiny
import torch
from gpu_training import METHODS, published_step, smooth_images
from test_gpu_kernels import ODD, SHAPES, draw_with_gap

from simsid.kernels import space_aware_memory


def output(z, M):
    return space_aware_memory(z, M, 5, backend="triton")


def test_autocast_leaves_the_float32_memory_alone(device, small, full_precision):
    z, M, _, _ = draw_with_gap(ODD if small else SHAPES["A"], 5)
    want = output(z, M)
    with torch.autocast(device.type, torch.bfloat16):
        assert output(z, M).equal(want)


def test_autocast_query_meets_a_float32_memory_at_full_precision(device, small, full_precision):
    z, M, g, _ = draw_with_gap(ODD if small else SHAPES["A"], 5, (torch.bfloat16, torch.float32))
    with torch.autocast(device.type, torch.bfloat16):
        memory.compare(z, M, g, 5)


def test_tf32_is_used_only_where_pytorch_allows_it(cuda):
    """With it the scores may be off by 1e-3; without it the result is that of the default."""
    z, M, _, _ = draw_with_gap(SHAPES["A"], 5)
    exact, default = space_aware_memory(z.double(), M.double(), 5, backend="torch"), output(z, M)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        rough = output(z, M)
    finally:
        torch.set_float32_matmul_precision(before)
    assert output(z, M).equal(default)
    assert (default - exact).abs().max() <= 1e-5 * exact.abs().max()
    # Rows whose set of items changed are off by the size of an item, the others by the rounding of their weights.
    off = (rough - exact).abs().amax(-1) > 1e-2 * exact.abs().max()
    assert off.float().mean() <= 2e-2 and not rough.equal(default)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_training_has_the_losses_of_float32(method, device, small):
    means = []
    for precision in ("float32", "bfloat16"):
        step = published_step(method, device, small, precision=precision, learning_rate=1e-6, cuda_graph=False)
        images = smooth_images(4, step.model.config.image_size).to(device)
        for number in range(4):
            step(images, number)
        means.append(step.means())
    # The discriminator normalizes four images: of its losses on reconstructions bf16 moves one by 7 % on an H200.
    for name, value in means[0].items():
        assert means[1][name] == pytest.approx(value, rel=1e-1 if name in ("fake", "adversarial") else 5e-2), name
    assert means[1].keys() == means[0].keys()
    assert all(parameter.dtype == torch.float32 for parameter in step.model.parameters())


def test_bf16_inference_keeps_signals_in_float64(device):
    model = tiny.model().to(device).eval()
    with torch.autocast(device.type, torch.bfloat16):
        rough = model.signals(tiny.images(4).to(device))
    exact = model.signals(tiny.images(4).to(device))
    for name, values in exact.items():
        assert rough[name].dtype == "float64"
        assert rough[name] == pytest.approx(values, rel=0.2, abs=0.05), name

"""Training on a GPU: nothing waits for the device, runs repeat, and the kernels train as the references do."""

import numpy as np
import pytest
import tiny
import torch
from gpu_training import (
    CHANGES,
    METHODS,
    assert_same,
    captured,
    published_step,
    smooth_images,
    train_published,
    train_tiny,
)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "captured"])
def test_no_iteration_waits_for_the_device(graph, cuda):
    step = train_tiny(4, cuda, cuda_graph=graph)
    images = tiny.images(4).to(cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(4, 8):
            step(images, number)
            step.set_learning_rate(1e-4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.means()


# PyTorch then checks the indices of the queue on the host, which no capture allows.
@pytest.mark.parametrize(("change", "graph"), [("simsid", True), ("squid", False)])
def test_tiny_training_repeats_bit_for_bit(change, graph, device, deterministic):
    one, other = (train_tiny(6, device, CHANGES[change], cuda_graph=graph) for _ in range(2))
    assert captured(one) == (graph and device.type == "cuda")
    assert_same(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_training_of_the_published_size_repeats_bit_for_bit(method, device, small, deterministic):
    one, other = (train_published(method, device, small, 4 if small else 20, cuda_graph=False) for _ in range(2))
    assert one.means() == other.means()
    assert_same(one, other)


def windowed(values, window):
    """Return means over consecutive windows."""
    kept = len(values) // window * window
    return np.array(values[:kept]).reshape(-1, window).mean(1)


def loss_curves(device, small, *, fused, moved=0.0):
    """Return the student's and the teacher's loss of every iteration that trains them."""
    steps, batch = (8, 4) if small else (200, 16)
    step = published_step("simsid", device, small, fused=fused)
    with torch.no_grad():
        for parameter in step.model.parameters():
            parameter.mul_(1 + moved)
    images, rows = smooth_images(8 * batch, step.model.config.image_size).to(device), []
    for number in range(steps):
        step(images[number % 8 * batch :][:batch], number)
        rows.append(step.means())
        step.reset()
    return {loss: [row[loss] for row in rows if loss in row] for loss in ("student", "teacher")}


def test_200_fused_steps_stay_as_close_to_the_reference_as_rounding_does(device, small):
    """The yardstick is a reference whose weights were moved by a millionth; allowed is three times that, plus 1 %."""
    reference = loss_curves(device, small, fused=False)
    moved, fused = loss_curves(device, small, fused=False, moved=1e-6), loss_curves(device, small, fused=True)
    for loss, values in reference.items():
        want = windowed(values, 1 if small else 10)
        far = [np.max(np.abs(windowed(curve[loss], 1 if small else 10) - want) / want) for curve in (moved, fused)]
        assert far[1] <= 3 * far[0] + 1e-2, f"{loss}: fused is {far[1]:.2g} off, a moved reference {far[0]:.2g}"

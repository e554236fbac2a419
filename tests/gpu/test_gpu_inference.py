"""Inference on a GPU: the replayed and folded model, the released code's numbers, and the CPU's data path."""

import concurrent.futures

import test_golden
import tiny
import torch
from gpu_training import smooth_images
from shared import needs_golden
from test_golden import FORWARD, assert_gradients, build, error, generator_loss

from simsid import Model
from simsid.data import augment, load_images
from simsid.kernels.launch import record_launches


def all_signals(model, images):
    return {name: torch.from_numpy(values) for name, values in model.signals(images).items()}


def plain_reconstruction(model, images):
    """Reconstruct through the modules as they are: no folded BatchNorm, no graph."""
    with torch.no_grad():
        return model.eval()(images, teacher=False).student


def test_frozen_model_computes_the_model(device, small, full_precision):
    torch.manual_seed(0)
    model = (tiny.model() if small else Model()).to(device).eval()
    frozen, images = model.freeze(), smooth_images(4, model.config.image_size).to(device)
    want, plain = all_signals(model, images), plain_reconstruction(model, images)
    torch.testing.assert_close(frozen.reconstruct(images), plain, rtol=1e-4, atol=1e-5)
    for _ in range(3):  # on CUDA the first call captures and the others replay
        for name, values in all_signals(frozen, images).items():
            torch.testing.assert_close(values, want[name], rtol=1e-3, atol=1e-5, msg=name)
    assert bool(frozen._graphs) == (device.type == "cuda")


def test_frozen_model_keeps_the_weights_that_it_was_made_of(device):
    model = tiny.model().to(device).eval()
    frozen, images = model.freeze(), tiny.images(16).to(device)
    before = all_signals(frozen, images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    after = all_signals(frozen, images)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not torch.equal(all_signals(model, images)["residual"], before["residual"])


def test_threads_that_share_a_frozen_model_do_not_mix_their_images(device):
    frozen = tiny.model().to(device).eval().freeze()
    batches = [tiny.images(16, seed) for seed in range(4)]
    want = [all_signals(frozen, batch) for batch in batches]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, values in zip(pool.map(lambda batch: all_signals(frozen, batch), batches), want):
                assert all(torch.equal(got[name], values[name]) for name in values)


def test_signals_are_those_of_a_cpu(device, small, full_precision):
    torch.manual_seed(0)
    model = (tiny.model() if small else Model()).eval()
    images = smooth_images(4, model.config.image_size)
    want = all_signals(model, images)
    got = all_signals(model.to(device), images.to(device))
    for name, values in want.items():
        torch.testing.assert_close(got[name], values, rtol=1e-3, atol=1e-5, msg=name)


def test_signals_do_not_depend_on_the_batch_or_the_run(device, small):
    model = (tiny.model() if small else Model()).to(device).eval()
    images = smooth_images(5, model.config.image_size).to(device)
    together = all_signals(model, images)
    for _ in range(2):
        alone = [all_signals(model, image[None]) for image in images]
        for name, values in together.items():
            assert torch.equal(values, torch.cat([one[name] for one in alone])), name


def test_fused_model_of_the_published_size_computes_the_reference(device, small, full_precision):
    torch.manual_seed(0)
    model = (tiny.model() if small else Model()).to(device).train()
    images, results = smooth_images(4, model.config.image_size).to(device), []
    for backend in ("torch", "auto"):
        for module in model.modules():
            if hasattr(module, "backend"):
                module.backend = backend
        torch.manual_seed(1)
        outputs = model(images)
        loss = outputs.student.square().mean() + outputs.distillation + outputs.teacher.mean()
        parameters = [weight for name, weight in model.named_parameters() if not name.startswith("discriminator.")]
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
        results.append((outputs.student.detach(), gradient))
    (student, gradient), (fused, its_gradient) = results
    assert (fused - student).norm() <= 1e-4 * student.norm()
    assert (its_gradient - gradient).norm() <= 2e-3 * gradient.norm()


# The released code ---------------------------------------------------------------------------------------------------


golden = test_golden.golden


@needs_golden
def test_fused_kernels_compute_the_numbers_of_the_released_code(golden, device, full_precision):
    model, images = build(golden).to(device), golden["input"].to(device)
    with record_launches() as launches, torch.no_grad():
        outputs = model(images, teacher=True)
        logits = model.discriminator(outputs.student)
    assert bool(launches) == (device.type == "cuda")
    wanted = {"reconstruction": outputs.student, "teacher_reconstruction": outputs.teacher}
    wanted |= {"distillation_loss": outputs.distillation}
    for name, value in wanted.items():
        assert error(value.cpu(), golden[f"eval.{name}"]) < FORWARD, name
    assert error(logits.cpu(), golden["eval.logit"][:, 0]) < FORWARD

    loss, outputs = generator_loss(model.train(), images)
    loss.backward()
    assert error(loss.detach().cpu(), golden["train.generator_loss"]) < FORWARD
    assert error(outputs.student.detach().cpu(), golden["train.reconstruction"]) < FORWARD
    assert_gradients(model, golden)


# Data on the device --------------------------------------------------------------------------------------------------


def test_generator_of_the_cpu_augments_the_same_on_any_device(device):
    images = torch.rand(4, 1, 32, 32) * 2 - 1
    results = [
        augment(images.to(where), generator=torch.Generator().manual_seed(0)) for where in (device, torch.device("cpu"))
    ]
    assert results[0].device.type == device.type
    assert torch.allclose(results[0].cpu(), results[1], atol=1e-5)


def test_image_set_gives_the_same_bits_on_any_device(device, tmp_path):
    images = load_images(tiny.films(tmp_path, 2), 64)
    assert torch.equal(images.batch([0, 1], device).cpu(), images.batch([0, 1]))
    there = images.to(device)
    for _ in range(20):
        assert torch.equal(there.batch([1, 0]), images.batch([1, 0]))
    assert all(batch.device.type == device.type for batch in there.batches(1))

"""Random translation and scale."""

import pytest
import torch

from simsid.data import augment


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def centres(images):
    """Centre of mass above the darkest value, `[B, 2]` (row, column), and the mass."""
    weight = images[:, 0] + 1
    mass = weight.sum((1, 2))
    rows = torch.arange(images.shape[2]).double()
    columns = torch.arange(images.shape[3]).double()
    row = (weight.sum(2) * rows).sum(1) / mass
    column = (weight.sum(1) * columns).sum(1) / mass
    return torch.stack([row, column], 1), mass


def blob(batch, size=40):
    axis = torch.arange(size).double() - (size - 1) / 2
    one = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 4**2))
    return (2 * one - 1).expand(batch, 1, size, size).clone()


def test_shape_dtype_and_no_change_of_the_input():
    images = torch.rand(5, 1, 20, 30) * 2 - 1
    before = images.clone()
    out = augment(images, generator=generator())
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    assert torch.equal(images, before)
    assert not torch.allclose(out, images)
    assert out.min() >= -1
    assert out.max() <= 1 + 1e-6


def test_same_generator_same_images_and_no_other_randomness():
    images = torch.rand(4, 1, 16, 16) * 2 - 1
    first = augment(images, generator=generator(7))
    torch.manual_seed(123)
    assert torch.equal(augment(images, generator=generator(7)), first)
    assert not torch.equal(augment(images, generator=generator(8)), first)
    state = torch.get_rng_state()
    augment(images, generator=generator(7))
    assert torch.equal(torch.get_rng_state(), state)


def test_translation_is_uniform_within_five_per_cent_and_per_axis():
    moved, mass = centres(augment(blob(1000), scale=0, generator=generator()))
    shift = (moved - 19.5) / 40
    assert mass.std() / mass.mean() < 1e-3
    assert shift.abs().max() <= 0.0505
    assert shift.abs().max() > 0.048
    assert shift.mean(0).abs().max() < 0.003
    assert shift.std(0).sub(0.05 / 3**0.5).abs().max() < 0.001
    assert abs(torch.corrcoef(shift.T)[0, 1]) < 0.08


def test_scale_is_isotropic_within_five_per_cent():
    out = augment(blob(1000), translate=0, generator=generator())
    moved, mass = centres(out)
    assert (moved - 19.5).abs().max() < 1e-3
    size = (mass / centres(blob(1))[1]).sqrt()
    assert 0.946 < size.min() < 0.953
    assert 1.047 < size.max() < 1.054
    # Isotropic: a round blob stays round.
    assert torch.allclose(out, out.transpose(2, 3), atol=1e-6)


def test_outside_is_filled_with_the_darkest_value():
    white = torch.ones(200, 1, 32, 32)
    out = augment(white, translate=0.25, scale=0.0, generator=generator())
    assert out.min() == -1
    assert (out == -1).any(3).any(2).float().mean() > 0.9
    assert (out[:, :, 8:24, 8:24] - 1).abs().max() < 1e-6


def test_nothing_to_draw_changes_nothing():
    images = torch.rand(3, 1, 9, 9)
    assert torch.equal(augment(images, translate=0, scale=0), images)


def test_half_precision_keeps_its_coordinates():
    images = blob(8).float()
    full = augment(images, generator=generator())
    half = augment(images.bfloat16(), generator=generator())
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().max() < 0.02


@pytest.mark.parametrize("arguments", [{"translate": -0.1}, {"scale": 1.0}, {"scale": -0.1}])
def test_impossible_ranges_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        augment(torch.zeros(1, 1, 4, 4), **arguments)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="images must be"):
        augment(torch.zeros(1, 4, 4))

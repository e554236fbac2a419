"""Encoder and generators: shapes for every choice of levels, and what may pass where."""

import pytest
import tiny
import torch

from simsid.models import patches
from simsid.models.generator import Encoder, Generator


def sized(P=2, levels=3, **changes):
    return tiny.config(image_size=64, patches=P, levels=levels, **changes)


def run(config, *, student=True, count=2):
    torch.manual_seed(0)
    encoder, generator = Encoder(config).eval(), Generator(config, student=student).eval()
    images = torch.randn(count, 1, config.image_size, config.image_size)
    with torch.no_grad():
        encoded = encoder(patches.split(images, config.patches))
        return encoded, generator(encoded.deepest, encoded.skips), generator


@pytest.mark.parametrize("levels", [3, 4])
@pytest.mark.parametrize("P", [1, 2, 4])
def test_encoder_shapes(P, levels):
    config = sized(P, levels)
    encoded, _, _ = run(config)
    S = config.patch_size
    widths = [4 * 2**level for level in range(levels + 1)]
    assert [tuple(skip.shape) for skip in encoded.skips] == [
        (2 * P * P, widths[i], S // 2**i, S // 2**i) for i in range(levels)
    ]
    assert tuple(encoded.deepest.shape) == (2 * P * P, widths[-1], S // 2**levels, S // 2**levels)


def test_eight_patches_and_a_fifth_level():
    config = tiny.config(image_size=64, patches=8, levels=3, heads=2)
    encoded, made, _ = run(config, count=1)
    assert encoded.deepest.shape == (64, 32, 1, 1) and made.images.shape == (1, 1, 64, 64)
    config = tiny.config(image_size=64, levels=5, width=1)
    encoded, made, _ = run(config, count=1)
    assert encoded.deepest.shape[1] == 16 and [f.shape[1] for f in made.features] == [16, 8, 4, 2, 1]


@pytest.mark.parametrize("kind", ["patch", "subpatch"])
@pytest.mark.parametrize("merge_levels", range(4))
@pytest.mark.parametrize("skip_levels", range(4))
def test_generator_shapes(skip_levels, merge_levels, kind):
    config = tiny.config(
        image_size=48, levels=3, skip_levels=skip_levels, merge_levels=merge_levels, decoder_memory=kind
    )
    encoded, made, generator = run(config)
    assert made.images.shape == (2, 1, 48, 48) and made.images.abs().max() <= 1
    for i, (feature, block) in enumerate(zip(made.features, generator.up)):
        skip = encoded.skips[2 - i]
        merged = i >= 3 - merge_levels
        assert tuple(feature.shape) == (
            (2, skip.shape[1], 2 * skip.shape[2], 2 * skip.shape[3]) if merged else skip.shape
        )
        below = encoded.deepest.shape[1] if i == 0 else made.features[i - 1].shape[1]
        wanted = below + (skip.shape[1] if i < skip_levels else 0)
        assert block.entry[0].in_channels == wanted and block.entry[0].stride == (1, 1)
    assert [memory.merged for memory in generator.memories] == [i >= 3 - merge_levels for i in range(2)]
    sizes = [encoded.skips[2 - i][0].numel() // (4 if kind == "subpatch" else 1) for i in range(2)]
    assert [tuple(memory.memory.items.shape) for memory in generator.memories] == [(4, 6, size) for size in sizes]


def test_four_levels_put_memories_before_the_merge():
    _, made, generator = run(tiny.config(image_size=64, levels=4))
    assert [memory.merged for memory in generator.memories] == [False, False]
    assert [feature.shape[0] for feature in made.features] == [8, 8, 2, 2]


def test_the_teacher_has_neither_memories_nor_in_painting():
    config = sized()
    _, made, teacher = run(config, student=False)
    student = Generator(config, student=True)
    assert teacher.inpainting is None and len(teacher.memories) == 0
    assert made.query is None and made.retrieved is None
    shared = {name for name in student.state_dict() if not name.startswith(("inpainting", "memories"))}
    assert set(teacher.state_dict()) == shared, "else they are built identically"


def test_nothing_crosses_a_patch_border_in_the_encoder():
    config = sized()
    torch.manual_seed(0)
    encoder, images = Encoder(config).eval(), torch.randn(2, 1, 64, 64)
    other = images.clone()
    other[0, :, 31, 31] += 1  # the corner of image 0's first patch that touches the other three
    with torch.no_grad():
        one, two = encoder(patches.split(images, 2)), encoder(patches.split(other, 2))
    for before, after in zip([one.deepest, *one.skips], [two.deepest, *two.skips]):
        assert [torch.equal(b, a) for b, a in zip(before, after)] == [False] + [True] * 7


def test_nothing_crosses_a_patch_border_in_the_early_decoder():
    """Before the merge the teacher's patches do not see each other; after it they do."""
    config = tiny.config(image_size=64, levels=3, merge_levels=1)
    torch.manual_seed(0)
    encoder, teacher = Encoder(config).eval(), Generator(config, student=False).eval()
    with torch.no_grad():
        encoded = encoder(torch.randn(4, 1, 32, 32))
        before = teacher(*encoded)
        encoded.deepest[0] += 1
        after = teacher(*encoded)
    for i in range(2):
        same = [torch.equal(b, a) for b, a in zip(before.features[i], after.features[i])]
        assert same == [False, True, True, True]
    last = patches.split(before.features[2], 2) != patches.split(after.features[2], 2)
    assert last[1].any() and last[2].any(), "the merged part works across borders"
    assert not last[1][:, :, 8:].any(), "yet only near them"


@pytest.mark.parametrize("skip_levels", range(4))
def test_outer_skips_are_absent(skip_levels):
    config = tiny.config(image_size=48, levels=3, skip_levels=skip_levels)
    encoded, before, generator = run(config)
    for i in range(3):
        skips = list(encoded.skips)
        skips[2 - i] = skips[2 - i] + 1
        with torch.no_grad():
            after = generator(encoded.deepest, skips)
        assert torch.equal(before.images, after.images) == (i >= skip_levels), f"skip of up block {i}"


def test_upsampling_is_bilinear_and_skips_come_first():
    config = tiny.config(image_size=48, levels=2, decoder_memories=0, inpainting="none", merge_levels=0)
    encoded, _, generator = run(config)
    seen = []
    generator.up[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        generator(*encoded)
    assert torch.equal(seen[0][:, :8], encoded.skips[1])
    x = encoded.deepest
    low, high = x[..., 2, 3], x[..., 2, 4]
    wanted = 0.75 * (0.75 * low + 0.25 * high) + 0.25 * (0.75 * x[..., 3, 3] + 0.25 * x[..., 3, 4])
    torch.testing.assert_close(seen[0][:, 8:, 5, 7], wanted)


def test_the_distilled_features_come_after_the_memory():
    config = sized()
    encoded, _, generator = run(config)
    found = []
    for memory in generator.memories:
        memory.register_forward_hook(lambda _, args, out: found.append((args[0], out)))
    with torch.no_grad():
        features = generator(*encoded).features
    for (given, returned), feature in zip(found, features):
        assert torch.equal(feature, returned) and not torch.equal(feature, given)


def test_convolution_block():
    """Three convolutions with bias, eps 1e-5 and momentum 0.1; the residual joins before the last ReLU."""
    torch.manual_seed(0)
    block = Encoder(tiny.config()).down[0].eval()
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        c1 = block.entry(x).relu()
        wanted = (c1 + block.outer(block.inner(c1).relu())).relu()
        assert torch.equal(block(x), wanted) and wanted.shape == (2, 8, 4, 4)
    for convolution, norm in (block.entry, block.inner, block.outer):
        assert convolution.bias is not None and convolution.padding == (1, 1) and convolution.kernel_size == (3, 3)
        assert (norm.eps, norm.momentum) == (1e-5, 0.1)
    assert [part[0].stride for part in (block.entry, block.inner, block.outer)] == [(2, 2), (1, 1), (1, 1)]

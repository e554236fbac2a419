"""What memories are said to hold and to use, against counts made one image at a time."""

import pytest
import tiny
import torch
from tiny_features import memory, normal

from simsid.models import PixelKNN
from simsid.models.memory import SpaceAwareMemory


@pytest.mark.parametrize("count", [5, 21], ids=["fewer images than a batch", "more than one batch"])
def test_uses_are_those_of_every_image_alone(count):
    model, images = tiny.model().eval(), tiny.images(count)
    contents, *decoders = model.memories(images)
    assert [entry.name for entry in (contents, *decoders)] == [
        "in-painting memory",
        "decoder memory 1",
        "decoder memory 2",
    ]
    expected = torch.zeros(4, 6, dtype=torch.int64)
    with torch.no_grad():
        for image in images.split(1):
            similarity = torch.einsum("ld,lnd->ln", model(image).query[0], contents.items)
            expected.scatter_add_(1, similarity.topk(2).indices, torch.ones(4, 2, dtype=torch.int64))
    assert torch.equal(contents.uses, expected) and contents.images == count and contents.kept == 2
    assert torch.equal(contents.dead, (expected == 0).double().mean(1))
    for entry in (contents, *decoders):
        assert entry.uses.sum() == 4 * 2 * count
        torch.testing.assert_close(entry.weight.sum(1), torch.full((4,), count, dtype=torch.float64))


def test_items_shared_by_sub_windows_or_locations_are_counted_together():
    contents = tiny.model(space_aware=False, decoder_memory="subpatch", patches=4, heads=1).memories(tiny.images(3))
    assert [tuple(entry.uses.shape) for entry in contents] == [(1, 6)] * 3
    # A patch has four sub-windows, each of which looks up.
    assert [int(entry.uses.sum()) for entry in contents] == [16 * 2 * 3, 16 * 4 * 2 * 3, 16 * 4 * 2 * 3]
    assert [tuple(entry.decoded.shape) for entry in contents] == [(4, 12, 12), (4, 6, 6), (4, 6, 6)]


def test_hard_shrinkage_counts_the_items_above_its_threshold():
    model = tiny.model(shrinkage="hard", hard_threshold=0.1)
    contents = model.memories(tiny.images(4))[0]
    query = model.eval()(tiny.images(4)).query
    p = torch.softmax(torch.einsum("bld,lnd->bln", query, contents.items), -1)
    assert torch.equal(contents.uses, (p > 0.1).sum(0)) and contents.kept == 0


@pytest.mark.parametrize("index", [0, 1, 2], ids=["in-painting memory", "decoder memory 1", "decoder memory 2"])
def test_item_of_a_memory_of_one_is_drawn_as_the_reconstruction_of_the_only_image(index):
    """The average image is that image, and each look-up returns the only item anyway."""
    model, image = tiny.model(items=1, decoder_items=1, topk=1).eval(), tiny.images(1)
    decoded = model.memories(image)[index].decoded
    torch.testing.assert_close(decoded[0], model.reconstruct(image)[0, 0], atol=1e-4, rtol=0)
    assert decoded[1:].isnan().all(), "there is no second item"


@pytest.mark.parametrize("space_aware", [True, False])
def test_latest_features_are_what_a_queue_would_hold(space_aware):
    model = tiny.model(items=6, space_aware=space_aware).eval()
    images = tiny.images(10)
    contents = model.memories(images)[0]
    queue = SpaceAwareMemory(model.config, 4, 6, contents.items.shape[2], queue=True)
    queue.push(model(images[len(contents.queries) :]).query.detach())
    held = queue.items[:, : contents.latest.shape[1]]
    for own, found in zip(held, contents.latest):
        assert torch.cdist(own, found).min(1).values.max() < 1e-4
    assert model.memories(images[:1])[0].latest is None and len(contents.queries) == 5
    assert tiny.model(memory="queue").memories(images)[0].latest is None


def test_collecting_leaves_no_hook_and_no_change_behind():
    model, images = tiny.model().eval(), tiny.images(4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.memories(images)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_models_without_memory_have_nothing_to_show():
    assert tiny.model(inpainting="none", decoder_memories=0).memories(tiny.images(2)) == ()
    model = PixelKNN(image_size=48).fit(tiny.images(4))
    assert model.memories(tiny.images(2)) == () and model.nearest_images(tiny.images(2)) is None


@pytest.fixture(scope="module")
def fitted():
    return memory().fit(normal(20))


def test_feature_memory_counts_items_and_the_stored_images_that_are_nearest(fitted):
    images = normal(5, 9)
    inpainting, pooled = fitted.memories(images)
    assert inpainting.uses.shape == (16, 5) and inpainting.uses.sum() == 16 * 2 * 5
    torch.testing.assert_close(inpainting.weight.sum(), torch.tensor(80.0, dtype=torch.float64))
    assert pooled.uses.shape == (1, 20) and pooled.kind == "images"
    assert torch.equal(pooled.uses[0], torch.bincount(fitted.nearest_images(images).flatten(), minlength=20))


def test_nearest_stored_image_is_the_one_that_the_image_was_made_of_and_never_itself(fitted):
    stored = normal(20)
    near = fitted.nearest_images((stored + 0.002 * torch.randn(stored.shape, generator=torch.Generator())).clamp(-1, 1))
    assert torch.equal(near[:, 0], torch.arange(20)) and near.shape == (20, 2)
    assert not (fitted.nearest_images(stored) == torch.arange(20)[:, None]).any()
    assert memory(most_images=10).fit(stored).nearest_images(stored) is None, "a sample has lost the numbers"

"""Memories: whose items a query sees, both shrinkages, noise, the queue, and the decoder memories' windows."""

import pytest
import tiny
import torch

from simsid.models import patches
from simsid.models.memory import DecoderMemory, SpaceAwareMemory, hard_shrinkage_memory


def memory(locations=4, items=6, features=5, *, queue=False, **changes) -> SpaceAwareMemory:
    torch.manual_seed(0)
    return SpaceAwareMemory(tiny.config(**changes), locations, items, features, queue=queue)


def look_up(query, items, topk, temperature=1.0):
    """The inclusive top-k look-up of one location, one query at a time."""
    out = torch.zeros_like(query)
    for b, z in enumerate(query):
        p = torch.softmax(items @ z / temperature, dim=0)
        kept = p.topk(min(topk, len(items))).indices
        out[b] = (p[kept] / p[kept].sum()) @ items[kept]
    return out


def test_initial_items():
    items = memory(items=500, features=16).items.detach()
    assert items.shape == (4, 500, 16)
    assert items.abs().max() <= 0.25 and items.max() > 0.24 and items.min() < -0.24, "uniform in 1 / sqrt(D)"


def test_a_query_sees_its_location_only():
    module, query = memory(topk=2), torch.randn(3, 4, 5)
    found = module(query)
    for place in range(4):
        torch.testing.assert_close(found[:, place], look_up(query[:, place], module.items[place], 2))
    with torch.no_grad():
        module.items[2] += 1
    changed = module(query)
    assert [torch.equal(found[:, place], changed[:, place]) for place in range(4)] == [True, True, False, True]


def test_shared_memory_is_one_for_all():
    module, query = memory(space_aware=False, topk=3), torch.randn(2, 4, 5)
    assert module.items.shape == (1, 6, 5)
    found = module(query)
    for place in range(4):
        torch.testing.assert_close(found[:, place], look_up(query[:, place], module.items[0], 3))


@pytest.mark.parametrize("topk", [6, 50])
def test_no_shrinkage_is_plain_attention(topk):
    module, query = memory(shrinkage="none", topk=1, threshold="exclusive"), torch.randn(2, 4, 5)
    wide = memory(topk=topk)
    p = torch.softmax(torch.einsum("bld,lnd->bln", query, module.items), dim=-1)
    expected = torch.einsum("bln,lnd->bld", p, module.items)
    torch.testing.assert_close(module(query), expected)
    torch.testing.assert_close(wide(query), expected, msg="k >= N keeps everything")


def test_exclusive_keeps_one_less():
    query = torch.randn(2, 4, 5)
    torch.testing.assert_close(memory(topk=3, threshold="exclusive")(query), memory(topk=2)(query))
    assert not memory(topk=1, threshold="exclusive")(query).any()


def test_temperature_divides():
    module, query = memory(topk=2, temperature=0.25), torch.randn(2, 4, 5)
    torch.testing.assert_close(module(query)[:, 1], look_up(query[:, 1], module.items[1], 2, 0.25))


@pytest.mark.parametrize("shared", [False, True])
def test_hard_shrinkage_against_a_loop(shared):
    torch.manual_seed(0)
    query = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    items = torch.randn(1 if shared else 2, 6, 4, dtype=torch.float64, requires_grad=True)
    found = hard_shrinkage_memory(query, items, 0.2, None, 1.0)
    dropped = 0
    for b in range(3):
        for place in range(2):
            M = items[0 if shared else place]
            p = torch.softmax(M @ query[b, place], dim=0)
            w = torch.stack([value if value > 0.2 else value * 0 for value in p])
            dropped += int((w == 0).sum())
            expected = (w / w.sum()) @ M if w.sum() else torch.zeros(4, dtype=torch.float64)
            torch.testing.assert_close(found[b, place], expected, rtol=1e-9, atol=1e-9)
    assert 0 < dropped < 36, "the threshold cuts some and leaves some"
    assert torch.autograd.gradcheck(lambda z, M: hard_shrinkage_memory(z, M, 0.2, None, 1.0), (query, items))


def test_hard_shrinkage_is_what_the_configuration_says():
    module, query = memory(shrinkage="hard", hard_threshold=0.15), torch.randn(2, 4, 5)
    torch.testing.assert_close(module(query), hard_shrinkage_memory(query, module.items, 0.15, None, 1.0))
    empty = memory(shrinkage="hard", hard_threshold=1.0)
    assert not empty(query).any(), "no item passes: nothing is returned, and nothing is NaN"


@pytest.mark.parametrize("shrinkage", ["topk", "hard"])
def test_noise_in_training_only(shrinkage):
    module, query = memory(gumbel_noise=True, shrinkage=shrinkage, topk=2), torch.randn(2, 4, 5)
    plain = memory(shrinkage=shrinkage, topk=2)
    state = torch.get_rng_state()
    assert torch.equal(module.eval()(query), plain(query))
    assert torch.equal(torch.get_rng_state(), state), "inference draws nothing"
    assert not torch.equal(module.train()(query), module(query))
    assert torch.equal(plain.train()(query), plain(query))


def test_gumbel_noise_samples_by_probability():
    module = memory(1, 3, 1, gumbel_noise=True, topk=1).train()
    with torch.no_grad():
        module.items.copy_(torch.tensor([[[0.2], [0.9], [1.6]]]))
        found = module(torch.full((20000, 1, 1), 1.0)).flatten()
    share = torch.stack([(found - value).abs().lt(1e-4).double().mean() for value in (0.2, 0.9, 1.6)])
    expected = torch.softmax(torch.tensor([0.2, 0.9, 1.6], dtype=torch.float64), dim=0)
    torch.testing.assert_close(share, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("sizes", [(2, 2), (4, 4, 4), (6,), (7, 1), (20, 3)])
def test_queue_is_first_in_first_out(sizes):
    module = memory(locations=3, items=6, features=2, queue=True)
    expected, pointer = module.items.clone(), 0
    for size in sizes:
        query = torch.randn(size, 3, 2)
        module.push(query)
        for b in range(size):
            expected[:, (pointer + b) % 6] = query[b]
        pointer = (pointer + size) % 6
        assert torch.equal(module.items, expected)
        assert module.pointer.item() == pointer


def test_shared_queue_takes_every_location_of_an_image_in_turn():
    module = memory(locations=3, items=8, features=2, queue=True, space_aware=False)
    query = torch.randn(2, 3, 2)
    module.push(query)
    assert torch.equal(module.items[0, :6], query.reshape(6, 2)) and module.pointer.item() == 6
    module.push(query)
    assert torch.equal(module.items[0, [6, 7, 0, 1, 2, 3]], query.reshape(6, 2)) and module.pointer.item() == 4


def test_queue_look_up_and_gradient():
    module, query = memory(queue=True, topk=2), torch.randn(3, 4, 5, requires_grad=True)
    before = module.items.clone()
    found = module(query)
    found.sum().backward()
    module.push(query)
    torch.testing.assert_close(found[:, 1], look_up(query[:, 1], before[1], 2), msg="content from before the step")
    assert not torch.equal(module(query), found)
    assert query.grad.abs().sum() > 0
    assert not list(module.parameters()) and not module.items.requires_grad


def test_queue_survives_saving():
    module, other = memory(queue=True), memory(queue=True)
    module.push(torch.randn(4, 4, 5))
    assert set(module.state_dict()) == {"items", "pointer"}
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.items, module.items) and other.pointer.item() == 4
    query = torch.randn(4, 4, 5)
    module.push(query)
    other.push(query)
    assert torch.equal(other.items, module.items) and other.pointer.item() == 2
    assert set(memory().state_dict()) == {"items"}, "learned items have no pointer"


def test_learned_items_get_the_straight_through_gradient():
    module, query = memory(topk=1), torch.randn(3, 4, 5)
    module(query).square().sum().backward()
    assert (module.items.grad.abs().sum(-1) > 0).all(), "items that were not kept learn too"


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["patch", "subpatch"])
def test_decoder_memory_against_slices(kind, merged):
    torch.manual_seed(0)
    config = tiny.config(decoder_memory=kind, topk=2)
    module = DecoderMemory(config, channels=3, size=4, merged=merged)
    locations, side = (4, 2) if kind == "subpatch" else (4, 4)
    assert module.memory.items.shape == (locations, 6, 3 * side * side)
    maps = torch.randn(2 * 4, 3, 4, 4)
    given = patches.merge(maps, 2) if merged else maps
    found = module(given)
    assert found.shape == given.shape
    found = patches.split(found, 2) if merged else found
    for n in range(8):
        if kind == "patch":
            wanted = look_up(maps[n].reshape(1, -1), module.memory.items[n % 4], 2).reshape(3, 4, 4)
            torch.testing.assert_close(found[n], wanted)
            continue
        for i in range(2):
            for j in range(2):
                window = (slice(None), slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2))
                query = maps[n][window].reshape(1, -1)
                wanted = look_up(query, module.memory.items[2 * i + j], 2).reshape(3, 2, 2)
                torch.testing.assert_close(found[n][window], wanted)


def test_layout_of_the_maps_does_not_matter():
    config = tiny.config()
    module, maps = DecoderMemory(config, channels=3, size=4, merged=True), torch.randn(2, 3, 8, 8)
    assert torch.equal(module(maps), module(maps.contiguous(memory_format=torch.channels_last)))


def test_sizes_are_printed():
    assert "locations=4, items=6, features=5, topk=2, queue=True" in repr(memory(queue=True))

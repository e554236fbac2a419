"""The in-painting block against a slow, explicit re-computation."""

import math

import pytest
import tiny
import torch
from torch.nn import functional as F

from simsid.models.inpainting import InpaintingBlock, NeighborAttention


def block(seed=0, **changes) -> InpaintingBlock:
    """A block whose weights, biases and norms are all away from their initial values."""
    torch.manual_seed(seed)
    made = InpaintingBlock(tiny.config(**{"patches": 3, "image_size": 48, **changes}))
    for name, parameter in made.named_parameters():
        if "bias" in name or "norm" in name:
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.2)
    for norm in (made.entry[1], made.exit[1]):
        torch.nn.init.normal_(norm.running_mean, 0.0, 0.1)
        torch.nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return made.eval()


def attention_by_hand(mixing: NeighborAttention, f, n):
    """Attention of each location by itself: loop over images, locations, heads and neighbors."""
    rows, columns = mixing.grid
    D = f.shape[-1]
    d = D // mixing.heads
    key, value = (mixing.key_value.weight[:D], mixing.key_value.weight[D:])
    key_bias, value_bias = mixing.key_value.bias[:D], mixing.key_value.bias[D:]
    out = torch.zeros_like(f)
    for b in range(len(f)):
        for i in range(rows):
            for j in range(columns):
                q = mixing.query.weight @ f[b, i * columns + j] + mixing.query.bias
                keys, values = [], []
                for di, dj in [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]:
                    inside = 0 <= i + di < rows and 0 <= j + dj < columns
                    if not inside and mixing.border == "mask":
                        continue
                    feature = n[b, (i + di) * columns + j + dj] if inside else torch.zeros_like(q)
                    keys.append(key @ feature + key_bias)
                    values.append(value @ feature + value_bias)
                attended = torch.zeros_like(q)
                for head in range(mixing.heads):
                    own = slice(head * d, (head + 1) * d)
                    if keys:
                        logits = torch.stack([k[own] @ q[own] for k in keys]) / math.sqrt(d)
                        weights = torch.softmax(logits, dim=0)
                        attended[own] = sum(w * v[own] for w, v in zip(weights, values))
                out[b, i * columns + j] = mixing.output.weight @ attended + mixing.output.bias
    return out


def block_by_hand(made: InpaintingBlock, x):
    L, w = made.locations, x.shape[-1]
    conv, norm = made.entry
    f = F.relu(F.batch_norm(F.conv2d(x, conv.weight), norm.running_mean, norm.running_var, norm.weight, norm.bias))
    f = torch.stack([patch.contiguous().view(-1) for patch in f]).view(-1, L, f[0].numel())
    n = made.memory(f)
    D = n.shape[-1]
    mixed = F.layer_norm(attention_by_hand(made.mixing, f, n), (D,), made.norm1.weight, made.norm1.bias, 1e-5)
    n2 = F.relu(mixed + n)
    first, last = made.feed_forward[0], made.feed_forward[3]
    ff = F.relu(n2 @ first.weight.T + first.bias) @ last.weight.T + last.bias
    n3 = F.relu(F.layer_norm(ff, (D,), made.norm2.weight, made.norm2.bias, 1e-5) + n2)
    maps = n3.view(len(x), -1, w, w)
    planes = []
    for patch in range(len(x)):
        digits = bin(patch % L)[2:].zfill(math.floor(math.log2(L)) + 1)
        planes.append(torch.stack([torch.full((w, w), float(digit)) for digit in digits]))
    conv, norm = made.exit
    y = F.conv2d(torch.cat([maps, torch.stack(planes)], dim=1), conv.weight, conv.bias)
    return F.relu(F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias)), f


@pytest.mark.parametrize("border", ["zero", "mask"])
@pytest.mark.parametrize("patches", [1, 2, 3])
def test_against_explicit_loops(patches, border):
    made = block(patches=patches, border=border)
    side = 48 // patches // 4
    x = torch.randn(2 * patches**2, 16, side, side)
    with torch.no_grad():
        found = made(x)
        wanted, query = block_by_hand(made, x)
    torch.testing.assert_close(found.features, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.query, query)
    assert torch.equal(found.retrieved, made.memory(found.query))


def test_borders_differ():
    x = torch.randn(9, 16, 4, 4)
    with torch.no_grad():
        zero, mask = block(border="zero")(x).features, block(border="mask")(x).features
    same = [torch.equal(zero[place], mask[place]) for place in range(9)]
    assert same == [False] * 4 + [True] + [False] * 4, "only the center of a 3 x 3 grid has all its neighbors"


@pytest.mark.parametrize(("patches", "bits"), [(1, 1), (2, 3), (3, 4), (4, 5), (8, 7)])
def test_index_planes(patches, bits):
    """Most significant bit first, floor(log2 L) + 1 of them."""
    made = InpaintingBlock(tiny.config(image_size=96, patches=patches))
    assert made.index_planes.shape == (patches**2, bits)
    for place, planes in enumerate(made.index_planes.tolist()):
        assert "".join(str(int(bit)) for bit in planes) == format(place, f"0{bits}b")
    assert made.exit[0].in_channels == 4 + bits
    assert "index_planes" not in made.state_dict(), "a constant is not saved"


@pytest.mark.parametrize("kind", ["attention", "convolution"])
def test_neighbors_only(kind):
    """A patch two steps away changes nothing, not even the last bit."""
    made = block(image_size=64, patches=4, inpainting=kind)
    D = made.memory.items.shape[-1]
    f, n = torch.randn(1, 16, D), torch.randn(1, 16, D)
    with torch.no_grad():
        before, other = made._mix(f, n), n.clone()
        other[0, 2] += 1  # row 0, column 2
        after = made._mix(f, other)
    changed = {place for place in range(16) if not torch.equal(before[0, place], after[0, place])}
    around = {1, 3, 5, 6, 7}
    assert changed == (around if kind == "attention" else around | {2})


def test_the_center_takes_no_part_as_key_or_value():
    made = block()
    f, n = torch.randn(1, 9, 64), torch.randn(1, 9, 64)
    other = n.clone()
    other[0, 4] += 1
    with torch.no_grad():
        assert torch.equal(made.mixing(f, n)[0, 4], made.mixing(f, other)[0, 4])


def test_initialization_is_that_of_packed_attention():
    torch.manual_seed(0)
    mixing, packed = NeighborAttention(64, (2, 2), 8, "zero", "torch"), torch.nn.MultiheadAttention(64, 8)
    for own in (mixing.query.weight, mixing.key_value.weight):
        assert own.abs().max().item() == pytest.approx(packed.in_proj_weight.abs().max().item(), rel=0.01)
    assert mixing.output.weight.abs().max().item() == pytest.approx(packed.out_proj.weight.abs().max().item(), rel=0.01)
    assert not any(layer.bias.any() for layer in (mixing.query, mixing.key_value, mixing.output))


def test_masked_shortcut_in_training_only():
    made, x = block(rho=0.7), torch.randn(900, 16, 4, 4)
    plain = block(rho=1.0)
    with torch.no_grad():
        assert torch.equal(made(x).features, plain(x).features), "off in inference"
        state = torch.get_rng_state()
        full = plain.train()(x).features
        assert torch.equal(torch.get_rng_state(), state), "rho = 1 draws nothing"
        mixed = made.train()(x).features
    kept = (mixed == full).all(1)
    passed = (mixed == x).all(1)
    assert (kept ^ passed).all(), "one draw for all channels: a position is the block's or the input's, whole"
    assert kept.double().mean().item() == pytest.approx(0.7, abs=0.02)
    assert 0 < kept[0].sum() < 16 and not torch.equal(kept[0], kept[1]), "drawn for every position of every patch"


def test_masked_shortcut_extremes():
    x = torch.randn(9, 16, 4, 4)
    made = block(rho=0.0).train()
    assert torch.equal(made(x).features, x), "rho = 0 keeps the input everywhere"


def test_memory_alone():
    made, x = block(inpainting="memory"), torch.randn(9, 16, 4, 4)
    assert not hasattr(made, "mixing") and not hasattr(made, "norm1")
    with torch.no_grad():
        found = made(x)
        planes = made.index_planes[:, :, None, None].expand(-1, -1, 4, 4)
        wanted = F.relu(made.exit(torch.cat([found.retrieved.reshape(9, 4, 4, 4), planes], dim=1)))
    torch.testing.assert_close(found.features, wanted)


def test_dropout_in_training_only():
    made, x = block(dropout=0.5), torch.randn(18, 16, 4, 4)
    with torch.no_grad():
        assert torch.equal(made(x).features, block()(x).features)
        assert not torch.equal(made.train()(x).features, made(x).features)


def test_gradients_reach_every_weight():
    for kind in ("attention", "convolution", "memory"):
        made = block(inpainting=kind).train()
        made(torch.randn(18, 16, 4, 4)).features.square().sum().backward()
        assert all(parameter.grad is not None for parameter in made.parameters()), kind
        assert made.memory.items.grad.any(-1).all(), "every item of every location"

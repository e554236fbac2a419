"""Calls of a known signature, which are only launched: they give what the first call gave, and hide from nobody."""

import pytest
import torch
from harness import DEVICE, needs_kernels
from torch.utils._python_dispatch import TorchDispatchMode

from simsid.kernels import neighbor_attention, residual_layer_norm, space_aware_memory
from simsid.kernels.attention import op as attention_op
from simsid.kernels.backend import TRITON_INSTALLED
from simsid.kernels.handles import Handles, record
from simsid.kernels.layer_norm import op as layer_norm_op
from simsid.kernels.memory import op as memory_op

if TRITON_INSTALLED:
    from simsid.kernels.sums.launchers import sum_parts

MODULES = {
    "memory": memory_op,
    "attention": attention_op,
    "packed": attention_op,
    "layer_norm": layer_norm_op,
}


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def memory(query, items):
    return space_aware_memory(query, items, 2, backend="triton")


def attention(query, key, value, pad_key, pad_value):
    pads = {"pad_key": pad_key, "pad_value": pad_value}
    return neighbor_attention(query, key, value, (2, 2), 2, **pads, backend="triton")


def packed(query, key_value, pads):
    return neighbor_attention(query, key_value, None, (2, 2), 2, pad_key=pads, backend="triton")


def layer_norm(*tensors):
    return residual_layer_norm(*tensors, backend="triton")


ROWS, ROW = (2, 4, 8), (8,)
SHAPES = {
    memory: (ROWS, (4, 5, 8)),
    attention: (ROWS, ROWS, ROWS, ROW, ROW),
    packed: (ROWS, (2, 4, 16), (16,)),
    layer_norm: (ROWS, ROWS, ROW, ROW),
}
pytestmark = needs_kernels
every_op = pytest.mark.parametrize("op", SHAPES, ids=lambda op: op.__name__)


@pytest.fixture
def forgotten(op, monkeypatch):
    handles = MODULES[op.__name__]._handles
    monkeypatch.setattr(handles, "_handles", {})
    return handles


def leaves(op):
    return [draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(SHAPES[op])]


def results(op, tensors, cotangent):
    out = op(*tensors)
    return [out, *torch.autograd.grad(out, tensors, cotangent)]


@every_op
@pytest.mark.parametrize("cotangent", ["contiguous", "expanded"])
def test_second_call_gives_the_bits_of_the_first(op, cotangent, forgotten):
    tensors, g = leaves(op), draw(*ROWS, seed=9) if cotangent == "contiguous" else draw(8, seed=9).expand(ROWS)
    first = results(op, tensors, g)
    assert any(handle is not None for handle in forgotten._handles.values())
    for again in (results(op, tensors, g), results(op, tensors, g)):
        assert all(map(torch.equal, again, first))
    with torch.no_grad():
        assert op(*tensors).equal(first[0]) and op(*tensors).equal(first[0])


@every_op
def test_unaligned_tensors_of_a_known_signature_give_the_same_bits(op, forgotten):
    tensors, g = leaves(op), draw(*ROWS, seed=9)
    first = results(op, tensors, g)
    flat = torch.zeros(tensors[0].numel() + 1, device=DEVICE)
    flat[1:] = tensors[0].detach().flatten()
    shifted = flat[1:].view(ROWS).requires_grad_()
    assert shifted.data_ptr() % 16
    assert all(map(torch.equal, results(op, [shifted, *tensors[1:]], g), first))


@every_op
def test_known_signature_is_seen_by_modes_and_profilers(op, forgotten):
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.name().partition(".")[0])
            return function(*args, **(kwargs or {}))

    tensors, g, seen = leaves(op), draw(*ROWS, seed=9), set()
    results(op, tensors, g)
    with Names():
        results(op, tensors, g)
    assert len([name for name in seen if name.startswith("simsid::")]) == 2
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        op(*tensors)
    assert any(event.key.startswith("simsid::") for event in profile.key_averages())


@every_op
def test_known_signature_has_no_second_derivative_and_no_transform(op, forgotten):
    tensors, g = leaves(op), draw(*ROWS, seed=9)
    results(op, tensors, g)
    (gradient,) = torch.autograd.grad(op(*tensors).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative in Triton"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
        torch.func.grad(lambda x: op(x, *tensors[1:]).sum())(tensors[0])


def test_hooks_may_return_saved_tensors_with_other_strides(monkeypatch):
    """As `torch.autograd.graph.save_on_cpu` does."""
    monkeypatch.setattr(attention_op, "_handles", Handles())
    both, query = draw(1, 2, 16, seed=0), draw(1, 2, 8, seed=1)

    def gradient():
        key, value = both.clone().requires_grad_().split(8, -1)
        out = neighbor_attention(query, key, value, (1, 2), 1, backend="triton")
        return torch.autograd.grad(out, (key, value), draw(1, 2, 8, seed=9))

    first = gradient()
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda x: x):
        assert all(map(torch.equal, gradient(), first))


def test_second_call_of_another_similarity_with_shared_items_gives_the_bits_of_the_first(monkeypatch):
    monkeypatch.setattr(memory_op, "_handles", handles := Handles())
    query, items = draw(1, 2, 8, seed=0).requires_grad_(), draw(1, 3, 8, seed=1)

    def results():
        out = space_aware_memory(query, items, 2, similarity="cosine", backend="triton")
        return out, *torch.autograd.grad(out, query, draw(1, 2, 8, seed=9))

    first = results()
    assert all(map(torch.equal, results(), first)) and None not in handles._handles.values()


def launches(*results):
    """Return host code that launches a kernel on its tensor, and returns what `results` make of it."""

    def run(x):
        out = x.new_empty(x.shape)
        sum_parts(x, out, None)
        return [result(x, out) for result in results]

    return run


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [x],
        lambda x: launches(lambda x, out: out)(x.contiguous()),
        lambda x: launches(lambda x, out: out)(x[..., 1:]),
        lambda x: launches(lambda x, out: out)(x.view(torch.int32)),
        launches(lambda x, out: out + 1),
        launches(lambda x, out: out.view(-1)),
    ],
    ids=["no launch", "copy", "part", "other dtype", "sum", "result of another shape"],
)
def test_what_a_replay_cannot_give_is_not_recorded(function):
    assert record(launches(lambda x, out: out), (draw(3, 2, 4, seed=0),)) is not None
    assert record(function, (draw(4, 2, 3, seed=0).transpose(0, 2),)) is None

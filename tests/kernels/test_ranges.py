"""NVTX ranges around the public ops."""

import inspect

import nvtx
import pytest
import torch

from simsid.kernels import neighbor_attention
from simsid.kernels.ranges import named_range


class Recorder:
    def __init__(self):
        self.events = []

    def get_event_attributes(self, message):
        return message

    def push_range(self, attributes):
        self.events.append(attributes)

    def pop_range(self):
        self.events.append("end")


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(nvtx, "get_domain", {"simsid": recorder}.__getitem__)
    return recorder


def test_each_call_is_one_range_even_if_it_raises(recorder):
    @named_range
    def double(x: int, *, fail: bool = False) -> int:
        """Double it."""
        if fail:
            raise ValueError
        return 2 * x

    assert double(3) == 6
    with pytest.raises(ValueError):
        double(3, fail=True)
    assert recorder.events == ["double", "end"] * 2
    assert double.__doc__ == "Double it." and list(inspect.signature(double).parameters) == ["x", "fail"]


def test_compiled_graph_has_no_range_and_no_break(recorder):
    torch._dynamo.reset()
    double = named_range(lambda x: 2 * x)
    x = torch.ones(3)
    torch.testing.assert_close(torch.compile(double, fullgraph=True, backend="eager")(x), 2 * x)
    assert not recorder.events


def test_public_ops_are_ranges():
    assert neighbor_attention.__wrapped__.__name__ == "neighbor_attention"

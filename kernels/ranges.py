"""Named ranges for profilers: NVTX, domain `simsid`; without a profiler a range costs half a microsecond."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

try:
    import nvtx
except ImportError:
    nvtx = None

P = ParamSpec("P")
R = TypeVar("R")


class stage:
    """A range around a block of code; none while `torch.compile` traces, whose graph cannot hold it."""

    def __init__(self, name: str) -> None:
        if nvtx is not None and not torch.compiler.is_compiling():
            self.domain = nvtx.get_domain("simsid")
            self.attributes = self.domain.get_event_attributes(message=name)

    def __enter__(self) -> None:
        if nvtx is not None and not torch.compiler.is_compiling():
            self.domain.push_range(self.attributes)

    def __exit__(self, *_: object) -> None:
        if nvtx is not None and not torch.compiler.is_compiling():
            self.domain.pop_range()


def named_range(call: Callable[P, R]) -> Callable[P, R]:
    """Put every call of a function into a range of its name."""
    if nvtx is None:
        return call
    around = stage(call.__name__)
    push, pop, attributes = around.domain.push_range, around.domain.pop_range, around.attributes

    @functools.wraps(call)
    def ranged(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # a graph cannot hold the range: profile its kernels by name
            return call(*args, **kwargs)
        push(attributes)
        try:
            return call(*args, **kwargs)
        finally:
            pop()

    return ranged

"""Named ranges for profilers: NVTX, domain `simsid`."""

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


def named_range(call: Callable[P, R]) -> Callable[P, R]:
    """Put every call into an NVTX range of the function's name; without a profiler that costs half a microsecond."""
    if nvtx is None:
        return call
    domain = nvtx.get_domain("simsid")
    attributes = domain.get_event_attributes(message=call.__name__)

    @functools.wraps(call)
    def ranged(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # a graph has no place for the range: profile its kernels by name
            return call(*args, **kwargs)
        domain.push_range(attributes)
        try:
            return call(*args, **kwargs)
        finally:
            domain.pop_range()

    return ranged

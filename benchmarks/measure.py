"""Device time from CUDA graphs, with a warm and a cold L2 cache; interleaved rounds; spread; memory; copy bandwidth."""

import contextlib
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

Work = Callable[[], object]  # one call on tensors of its own

ROUNDS = 30
GRAPH_SECONDS = 2e-3  # a replay this long hides the launch of the graph
MOST_CALLS = 400
COPY_BYTES = 1 << 28


class Times(NamedTuple):
    """The median of some seconds, and their spread: half the interquartile range in percent of the median."""

    median: float
    spread: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Times":
        """Summarize at least one measurement."""
        middle = statistics.median(seconds)
        if len(seconds) < 2:
            return cls(middle, float("nan"))
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(middle, 50 * (high - low) / middle)


@functools.cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def on_stream() -> contextlib.AbstractContextManager:
    """Work on the stream that graphs are captured on.

    The autograd engine runs a backward pass on the stream of its forward pass: a backward pass can only be captured
    alone where the forward pass ran on the capturing stream.
    """
    if not torch.cuda.is_available():
        return contextlib.nullcontext()
    torch.cuda.synchronize()
    return torch.cuda.stream(_stream())


def forget_compiled() -> None:
    """Drop compiled code of other groups, which would count against the limit of recompilations."""
    if "torch._dynamo" in sys.modules:  # its import takes seconds
        torch._dynamo.reset()


def synchronize() -> None:
    """Wait for the GPU where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def wall_seconds(work: Work) -> float:
    """Return the seconds from the call in Python to the end of its work on the device."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def capture(calls: Sequence[Work]) -> torch.cuda.CUDAGraph:
    """Capture the calls, one after the other, in one graph.

    Call inside `on_stream`. The first call is warmed up: compiling or allocating workspaces inside a capture fails.
    """
    for _ in range(3):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_stream()):
        for call in calls:
            call()
    return graph


class Replays:
    """A captured graph of several calls; `seconds` replays it once and returns the device seconds of one call."""

    def __init__(self, calls: Sequence[Work]) -> None:
        self.calls = calls  # they hold the tensors that the graph reads, at fixed addresses
        self.graph = capture(calls)

    def seconds(self) -> float:
        """Replay once, timed by events on the device."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / len(self.calls)


def device_replays(prepare: Callable[[], Work], bytes_read: int) -> dict[str, Replays]:
    """Return graphs of many calls: `device` repeats one call, `cold` goes round copies larger than twice the L2 cache.

    Args:
        prepare: returns a call on freshly made tensors (inputs, saved tensors and cotangent).
        bytes_read: bytes of these tensors in one call, from which the number of copies follows.
    """
    warm = prepare()
    once = Replays([warm])
    once.seconds()
    calls = max(1, min(MOST_CALLS, round(GRAPH_SECONDS / once.seconds())))
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    copies = [prepare() for _ in range(max(2, min(MOST_CALLS, -(-2 * l2 // bytes_read))))]
    return {"device": Replays([warm] * calls), "cold": Replays(copies * -(-calls // len(copies)))}


def interleaved(calls: dict[str, Callable[[], float]], seconds: dict[str, list[float]]) -> None:
    """Run one round: take one measurement of every call, in turn, so that drift of the clock meets all alike."""
    for name, call in calls.items():
        seconds.setdefault(name, []).append(call())


def peak_bytes(work: Work) -> int:
    """Return the most memory that one call holds above what was held before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@functools.cache
def copy_bytes_per_second() -> float:
    """Return the bytes read and written per second by PyTorch's copy of a tensor larger than any cache."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    replays = Replays([lambda: target.copy_(source)] * 10)
    return 2 * COPY_BYTES / statistics.median(replays.seconds() for _ in range(ROUNDS))


class PeakMemory:
    """The most memory that a model reserves on the GPU: weights, optimizers, activations, captured graphs.

    Counted in what the allocator reserves, because a captured graph keeps its memory between replays. Zero on a CPU.
    """

    def __init__(self) -> None:
        self.before = 0
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_reserved()

    def row(self) -> dict[str, float]:
        """Return the column for a table; no column on a CPU."""
        if not torch.cuda.is_available():
            return {}
        return {"peak_mb": (torch.cuda.max_memory_reserved() - self.before) / 1e6}


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Switch TensorFloat-32 off: with it, another order of summation shows in the third digit."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn

"""Time on the device alone: CUDA graphs of many calls, with warm and with cold L2, and the copy speed to judge by.

And the memory that a model holds, and the precision at which variants are compared.
"""

import functools
import gc
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Run = Callable[..., object]  # takes one set of input tensors

REPLAYS = 20
GRAPH_SECONDS = 2e-3  # long enough that launching the graph does not count
MOST_CALLS = 400
COPY_BYTES = 1 << 28


def capture(run: Run, sets: Sequence[tuple[Tensor, ...]]) -> torch.cuda.CUDAGraph:
    """Record `run` on each set of inputs, one after the other, into one graph; nothing may compile in it any more."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(*sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for inputs in sets:
            run(*inputs)
    return graph


def _seconds_per_call(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    """Return the median over replays."""
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / calls)
    return statistics.median(times)


def device_seconds(run: Run, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Return the device seconds of one call: `warm`, on the same tensors again and again, and `cold`.

    Cold calls go round copies of the inputs that together are twice as large as the L2 cache.
    """
    once = _seconds_per_call(capture(run, [inputs]), 1)
    calls = max(1, min(MOST_CALLS, round(GRAPH_SECONDS / once)))
    size = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    l2 = torch.cuda.get_device_properties(inputs[0].device).L2_cache_size
    copies = max(2, min(MOST_CALLS, -(-2 * l2 // size)))
    sets = [tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs) for _ in range(copies)]
    rounds = -(-calls // copies)
    return {
        "warm": _seconds_per_call(capture(run, [inputs] * calls), calls),
        "cold": _seconds_per_call(capture(run, sets * rounds), copies * rounds),
    }


def peak_bytes(run: Run, inputs: tuple[Tensor, ...]) -> int:
    """Return the most memory that one call holds above what was held before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(*inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@functools.cache
def copy_bytes_per_second() -> float:
    """Return the bytes read and written per second by PyTorch's copy of a tensor that no cache holds."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    calls = 10
    return 2 * COPY_BYTES / _seconds_per_call(capture(target.copy_, [(source,)] * calls), calls)


class Held:
    """The most memory a model takes on the GPU, weights, optimisers and recorded graphs included; nothing on a CPU.

    Counted in what the allocator reserves, since a recorded graph keeps its memory between replays.
    """

    def __init__(self) -> None:
        self.before = self._settle()

    def restart(self) -> None:
        """Begin anew, without what has been freed since."""
        self._settle()

    def row(self) -> dict[str, float]:
        """Return the column for a table."""
        if not torch.cuda.is_available():
            return {}
        return {"peak_mb": (torch.cuda.max_memory_reserved() - self.before) / 1e6}

    @staticmethod
    def _settle() -> int:
        gc.collect()
        if not torch.cuda.is_available():
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_reserved()


def full_precision(check: Run) -> Run:
    """Run a check without TensorFloat-32, in which another order of summation shows in the third digit."""

    @functools.wraps(check)
    def checked(*args: object) -> object:
        matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        try:
            return check(*args)
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn

    return checked

"""CUDA graphs: work recorded once and replayed with one launch."""

from collections.abc import Callable

import torch
from torch import Tensor

REHEARSALS = 3
"""Runs before the recording, in which kernels are compiled, libraries make their plans and optimisers their state."""


class Replay:
    """Recorded work on tensors of fixed shapes: a call copies its inputs to where they were recorded and replays.

    `output` is what the work returned when it was recorded; every call overwrites it.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: list[Tensor], output: object) -> None:
        self.graph, self.inputs, self.output = graph, inputs, output

    def __call__(self, *inputs: Tensor) -> object:
        """Replay on `inputs`, of the shapes recorded; returns `output` before its work is done."""
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.output


def record(
    work: Callable[..., object],
    inputs: list[Tensor],
    *,
    between: Callable[[], None] | None = None,
    share: Replay | None = None,
) -> Replay:
    """Record `work(*inputs)`: it may neither wait for the device nor copy from the host.

    The recording computes nothing, the rehearsals before it do.

    Args:
        work: what is recorded; it runs `REHEARSALS` times before.
        inputs: examples of its arguments, on one GPU; copied.
        between: called after the rehearsals, to put back what they changed.
        share: an earlier recording whose memory may be used again; the two must never run at the same time, and what
            either returns is lost when the other runs.

    Raises:
        RuntimeError: work that cannot be recorded.
    """
    # Made in PyTorch's inference mode, they could not be written outside it.
    with torch.inference_mode(False):
        kept = [tensor.clone() for tensor in inputs]
    device = kept[0].device
    with torch.cuda.device(device):
        before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream):
                for _ in range(REHEARSALS):
                    work(*kept)
                if between is not None:
                    between()
        finally:
            # Before whatever puts right what a failed rehearsal left.
            before.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # What other threads do with the GPU meanwhile (pinning, allocating) is no part of it and does no harm.
            pool, mode = share.graph.pool() if share is not None else None, "thread_local"
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
                output = work(*kept)
        finally:
            # Where the recording fails, PyTorch leaves its stream the current one.
            torch.cuda.set_stream(before)
    return Replay(graph, kept, output)

"""CUDA graphs: capture work once, then replay it with one launch."""

from collections.abc import Callable

import torch
from torch import Tensor

WARMUPS = 3
"""Runs before the capture, in which kernels are compiled, libraries choose algorithms and optimizers create state."""


class CapturedGraph:
    """Captured work on tensors of fixed shapes: a call copies its inputs into the captured ones and replays.

    Args:
        graph: the captured graph.
        inputs: the tensors that the graph reads.
        output: what the work returned while it was captured; every replay overwrites it.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: list[Tensor], output: object) -> None:
        self.graph, self.inputs, self.output = graph, inputs, output

    def __call__(self, *inputs: Tensor) -> object:
        """Replay on `inputs`, of the captured shapes; returns `output` before the device has computed it."""
        for target, source in zip(self.inputs, inputs, strict=True):
            target.copy_(source, non_blocking=True)
        self.graph.replay()
        return self.output


def capture(
    work: Callable[..., object],
    inputs: list[Tensor],
    *,
    after_warmup: Callable[[], None] | None = None,
    share_memory_with: CapturedGraph | None = None,
) -> CapturedGraph:
    """Capture `work(*inputs)`, which must neither wait for the device nor copy from the host.

    The warm-up runs compute; the capture itself computes nothing.

    Args:
        work: what is captured, after `WARMUPS` runs of it.
        inputs: examples of its arguments, on one GPU; they are copied.
        after_warmup: called before the capture, to restore what the warm-up runs changed.
        share_memory_with: an earlier graph whose memory pool is reused. The two must never run at the same time, and
            the output of either is lost when the other runs.

    Raises:
        RuntimeError: the work cannot be captured (PyTorch's own error).
    """
    # Inference tensors could not be written outside inference mode.
    with torch.inference_mode(False):
        static_inputs = [tensor.clone() for tensor in inputs]
    device = static_inputs[0].device
    with torch.cuda.device(device):
        caller_stream, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(caller_stream)
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARMUPS):
                    work(*static_inputs)
                if after_warmup is not None:
                    after_warmup()
        finally:
            # A caller that restores state after a failed warm-up run must not overtake what that run still does.
            caller_stream.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = share_memory_with.graph.pool() if share_memory_with is not None else None
        try:
            # "thread_local": calls of other threads (pinning, allocating) are no part of the capture and may go on.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                output = work(*static_inputs)
        except RuntimeError as error:
            _renew_generator(device)
            # Ending the capture fails too, with an error that does not say why.
            if isinstance(error.__context__, RuntimeError):
                raise error.__context__ from None
            raise
        finally:
            # A failed capture leaves its own stream the current one.
            torch.cuda.set_stream(caller_stream)
    return CapturedGraph(graph, static_inputs, output)


def _renew_generator(device: torch.device) -> None:
    """Let the GPU's generator draw again: after a failed capture its state counts as captured, and draws are errors."""
    generator, fresh = torch.cuda.default_generators[device.index or 0], torch.Generator(device)
    fresh.set_state(generator.get_state())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())

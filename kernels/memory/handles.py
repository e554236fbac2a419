"""Calls of the space-aware memory that were recorded once, so that the next ones only allocate and launch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from simsid.kernels.launch import record_launches
from simsid.kernels.library import aligned
from simsid.kernels.memory import launchers


class Step(NamedTuple):
    """One launch: its kernel, what is the same in every call, and the place of each tensor."""

    kernel: Any
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int
    constants: dict[str, Any]
    pointers: dict[str, int]


class Recording(NamedTuple):
    """The launches of a host function; tensors are counted, the inputs first."""

    steps: tuple[Step, ...]
    made: tuple[tuple[tuple[int, ...], torch.dtype], ...]  # shapes and dtypes of the tensors that the function makes
    results: tuple[int, ...]

    def replay(self, *inputs: Tensor) -> list[Tensor]:
        """Launch on inputs of the recorded shapes, strides and dtypes; return the results."""
        device = inputs[0].device
        tensors = [*inputs, *[torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.made]]
        with launchers.on_device(inputs[0]):
            for kernel, grid, num_warps, num_stages, constants, pointers in self.steps:
                given = {name: tensors[place] for name, place in pointers.items()}
                launchers.launch(kernel, grid, num_warps, num_stages, **given, **constants)
        return [tensors[place] for place in self.results]


class Handle(NamedTuple):
    """The recorded passes of a call."""

    forward: Recording
    backward: Recording | None  # for a contiguous gradient of the output; None where no gradient is needed


def record(function: Any, inputs: tuple[Tensor, ...], *options: Any) -> Recording:
    """Run a host function on meta tensors like `inputs`, without launching, and record its launches."""
    copies = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in inputs]
    with record_launches(run=False) as launches:
        results = function(copies, *options)
    tensors = list(copies)

    def place(tensor: Tensor) -> int:
        for number, known in enumerate(tensors):
            if known is tensor:
                return number
        tensors.append(tensor)
        return len(tensors) - 1

    steps = []
    for launched in launches:
        pointers = {name: place(x) for name, x in launched.arguments.items() if isinstance(x, Tensor)}
        constants = {name: x for name, x in launched.arguments.items() if name not in pointers}
        steps.append(Step(*launched[:2], launched.num_warps, launched.num_stages, constants, pointers))
    ends = tuple(map(place, results))
    return Recording(tuple(steps), tuple((tuple(x.shape), x.dtype) for x in tensors[len(inputs) :]), ends)


def make_handle(
    query: Tensor, memory: Tensor, topk: int, exclusive: bool, temperature: float, gradient: bool
) -> Handle | None:
    """Record the passes of a call; None where a call has to prepare its tensors, or needs one gradient alone."""
    one_gradient = gradient and not (query.requires_grad and memory.requires_grad)
    ready = query.is_contiguous() and memory.is_contiguous() and memory.shape[0] == query.shape[1]
    if not query.shape[0] or not ready or one_gradient:
        return None
    target = launchers._target(query.device)

    def forward(tensors: list[Tensor]) -> list[Tensor]:
        return launchers.memory_forward(
            *tensors, None, None, topk, exclusive, False, temperature, gradient, False, target
        )

    def backward(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        grad_out, query, memory, p = tensors
        return launchers.memory_backward(grad_out, query, memory, None, [p], temperature, True, True, target)

    first = record(forward, (query, memory))
    if not first.steps:
        return None
    p = query.new_empty((*query.shape[:2], memory.shape[1]), dtype=torch.float32)
    return Handle(first, record(backward, (query, query, memory, p)) if gradient else None)


def usable(handle: Handle | None, *tensors: Tensor) -> bool:
    """Return whether the handle can take tensors of its signature: their starts are the last thing to check."""
    return handle is not None and aligned(*tensors)

"""Calls of the space-aware memory that were recorded once, so that the next ones only allocate and launch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from simsid.kernels.launch import record_launches
from simsid.kernels.memory import launchers


class Step(NamedTuple):
    """One launch: its kernel, what is the same in every call, and the place of each tensor."""

    kernel: Any
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int
    constants: dict[str, Any]
    pointers: tuple[tuple[str, int], ...]


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
                arguments = constants.copy()
                for name, place in pointers:
                    arguments[name] = tensors[place]
                launchers.launch(kernel, grid, num_warps, num_stages, **arguments)
        return [tensors[place] for place in self.results]


def record(function: Any, inputs: tuple[Tensor, ...], *options: Any) -> Recording | None:
    """Run a host function on meta tensors like `inputs`, without launching, and record its launches.

    Return None where there is none, or one takes a view: as a tensor of its own it would hold nothing.
    """
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
        plan = (launched.kernel, launched.grid, launched.num_warps, launched.num_stages)
        steps.append(Step(*plan, constants, tuple(pointers.items())))
    ends = tuple(map(place, results))
    if not steps or any(tensor._is_view() for tensor in tensors):
        return None
    return Recording(tuple(steps), tuple((tuple(x.shape), x.dtype) for x in tensors[len(inputs) :]), ends)

"""Calls of a known signature: checked, planned and recorded once, so that the next ones only allocate and launch.

The host time of a call bounds small ops. `Handles` finds the recording of a call by its signature. `record` runs the
host code of an op on meta tensors, and keeps which tensors it allocates and what it launches. Whatever could watch or
rewrite ops takes the long way, through the checks of `op.py` and PyTorch's dispatcher.
"""

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from simsid.kernels.launch import Launch, Repeated, on_device, record_launches
from simsid.kernels.library import PLAIN, usable, watched

Tensors = Sequence[Tensor | None]
Passes = tuple[Callable[..., Tensors], Callable[..., Tensors], Callable[..., Tensors]]
"""The host code of an op.

Forward: from the tensors to the output and what the backward needs. Backward: from the gradient of the output and what
the forward returned after the output to the gradients of the tensors. The same for a gradient of the output that is
strided, watched or differentiated again, with PyTorch's dispatcher.
"""


class Step(NamedTuple):
    """One launch, and which tensors and numbers are its arguments."""

    launch: Repeated
    numbers: tuple[Any, ...]  # and whatever else is the same in every call
    pick: Callable[[Sequence[Any]], tuple[Any, ...]]  # takes the arguments out of the tensors, followed by the numbers


class Recording(NamedTuple):
    """The launches of a host function; its tensors are numbered, the inputs first."""

    steps: tuple[Step, ...]
    made: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]  # of the tensors that the function allocates
    results: tuple[int | None, ...]  # numbers of the tensors that the function returns

    def replay(self, *inputs: Tensor | None) -> list[Any]:
        """Launch on inputs of the recorded shapes, strides and dtypes; return the results."""
        first = inputs[0]
        assert first is not None
        device = first.device
        # PyTorch reads these arguments faster than those of `torch.empty`.
        made = [torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype in self.made]
        tensors = [*inputs, *made]
        with on_device(first):
            for launch, numbers, pick in self.steps:
                launch(*pick([*tensors, *numbers]))
        return [None if index is None else tensors[index] for index in self.results]


class Handle(NamedTuple):
    """The recorded passes of a call."""

    forward: Recording  # returns the output and what is saved for the backward
    backward: Recording | None  # of a contiguous gradient of the output and what was saved; None without gradients
    long_way: Callable[..., Any]  # the same for any gradient of the output

    def launch(self, tensors: Tensors) -> Tensor:
        """Compute the op as it was recorded."""
        if self.backward is None:
            return self.forward.replay(*tensors)[0]
        return _apply(self, *tensors)


class _Recorded(torch.autograd.Function):
    """An op with its gradient, by their launches alone."""

    @staticmethod
    def forward(ctx: Any, handle: Handle, *tensors: Tensor | None) -> Tensor:
        out, *saved = handle.forward.replay(*tensors)
        ctx.save_for_backward(*saved)
        ctx.handle = handle
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        _, backward, long_way = ctx.handle
        if torch.is_grad_enabled() or type(grad_out) not in PLAIN or not usable(grad_out) or watched():
            return None, *long_way(grad_out, *ctx.saved_tensors)
        return None, *backward.replay(grad_out, *ctx.saved_tensors)


# `Function.apply` looks for wrappers of transforms first, which `Handles.find` sends the long way.
_apply = super(torch.autograd.Function, _Recorded).apply


class Handles:
    """The handles of an op by the signature of the call; forgotten when there are `MOST` of them."""

    MOST = 1024

    def __init__(self) -> None:
        self._handles: dict[Any, Handle | None] = {}

    def find(self, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, Handle | None]:
        """Return the signature of a call, None where it can have no handle, and its handle, None where there is none.

        Transforms and whatever watches ops need the long way. So does an argument that is not hashable or no tensor,
        and so do hooks on saved tensors, which may return them with other strides.
        """
        if (
            watched()
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
            or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        ):
            return None, None
        signature = [options, torch.is_grad_enabled()]
        try:
            for x in tensors:
                if x is None:
                    signature.append(None)
                elif type(x) in PLAIN:
                    # Copies are made of tensors that do not start at a multiple of 16 bytes.
                    signature.append((x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.data_ptr() & 15))
                else:
                    return None, None
            key = tuple(signature)
            return key, self._handles.get(key)
        except (RuntimeError, TypeError):
            return None, None

    def keep(self, signature: Any, tensors: Tensors, passes: Passes) -> None:
        """Record a call for the next ones of its signature."""
        forward, backward, long_way = passes
        if len(self._handles) >= self.MOST:
            self._handles.clear()
        self._handles[signature] = None
        # The launchers copy such tensors first, which a replay would leave out.
        if any(x is not None and x.data_ptr() & 15 for x in tensors):
            return
        first = record(forward, tensors)
        if first is None:
            return
        recording, (out, *saved) = first
        second = None
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            assert out is not None
            second = record(backward, (torch.empty_like(out), *saved))
            if second is None:
                return
        self._handles[signature] = Handle(recording, second and second[0], long_way)


class _Allocations(TorchDispatchMode):
    """Notes whether PyTorch does more than allocate and view, which a replay would leave out."""

    allowed = frozenset(("aten::empty", "aten::empty_like", "aten::new_empty", "aten::view"))
    only_allocations = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.only_allocations = self.only_allocations and function._schema.name in self.allowed
        return function(*args, **(kwargs or {}))


def record(function: Callable[..., Tensors], inputs: Tensors) -> tuple[Recording, Tensors] | None:
    """Run a host function on meta tensors like `inputs`, without launching, and record its launches.

    Returns:
        The recording and the function's results; a result without elements is None. None instead of both where a
        replay could not give the same: nothing is launched, PyTorch computes something, or a view is of another dtype,
        starts elsewhere or is returned in another shape than that of the tensor.
    """
    tensors = [
        None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in inputs
    ]
    with record_launches(run=False) as launches, _Allocations() as allocations:
        results = [x if x is None or x.numel() else None for x in function(*tensors)]
    replayable = bool(launches) and allocations.only_allocations

    def index_of(tensor: Tensor) -> int:
        """Return the number of a tensor, or of the one that it is a view of: a kernel sees where a tensor starts."""
        nonlocal replayable
        for number, known in enumerate(tensors):
            if known is not None and known.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
                replayable = replayable and (known.dtype, known.storage_offset()) == (
                    tensor.dtype,
                    tensor.storage_offset(),
                )
                return number
        replayable = replayable and tensor.is_contiguous() and not tensor.storage_offset()
        tensors.append(tensor)
        return len(tensors) - 1

    picked = [
        [index_of(x) if isinstance(x, Tensor) else None for x in map(launched.arguments.get, launched.kernel.arg_names)]
        for launched in launches
    ]
    returned = tuple(None if x is None else index_of(x) for x in results)
    stored = [(x, tensors[i]) for x, i in zip(results, returned) if x is not None and i is not None]
    same = all(tensor is not None and _layout(x) == _layout(tensor) for x, tensor in stored)
    if not replayable or not same:
        return None
    steps = tuple(_step(launched, indices, len(tensors)) for launched, indices in zip(launches, picked))
    made = tuple((x.shape, x.stride(), x.dtype) for x in tensors[len(inputs) :] if x is not None)
    return Recording(steps, made, returned), results


def _step(launched: Launch, indices: list[int | None], tensors: int) -> Step:
    """Return a launch whose pointers have these indices among the tensors; None stands for a number."""
    arguments = launched.arguments
    numbers = [arguments[name] for name, index in zip(launched.kernel.arg_names, indices) if index is None]
    count = itertools.count(tensors)
    pick = operator.itemgetter(*[next(count) if index is None else index for index in indices])
    repeated = Repeated(launched.kernel, launched.grid, launched.num_warps, launched.num_stages)
    return Step(repeated, tuple(numbers), pick)


def _layout(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    return tensor.shape, tensor.stride()

"""Registration of the custom ops and the error of their second derivative, written once for all of them.

`torch.library` define + impl + fake with a plain `autograd.Function` around it is the cheapest registration that
`torch.compile(fullgraph=True)`, export and opcheck accept. The Functions do without `setup_context`, with which every
call would bind its signature; only `torch.func` needs it, and `backend.py` sends that to the references.

In plain eager mode not even the dispatcher is asked: `register` returns a function that calls the kernels' host code
itself. Whatever could watch or rewrite ops goes through PyTorch. What such a call has checked and planned is kept for
the next one of the same signature (`Handles`): together they halve the host time, which bounds small ops.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_library = torch.library.Library("simsid", "FRAGMENT")


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register an op of the namespace `simsid`.

    Args:
        schema: name, arguments and results, as in `"scale(Tensor x, float factor) -> Tensor"`.
        run: computes it by kernels, on CUDA or, in Triton's interpreter, on a CPU.
        fake: returns empty tensors of the results' shapes and dtypes, for tracing.

    Returns:
        A function that calls `torch.ops.simsid.<name>` or, where nothing watches PyTorch's ops, `run`.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CUDA", "CPU"):
        _library.impl(name, run, device)
    torch.library.register_fake(f"simsid::{name}", fake, lib=_library)
    op = getattr(torch.ops.simsid, name)

    def call(*arguments: Any) -> Any:
        return op(*arguments) if watched(*arguments) else run(*arguments)

    return call


def watched(*arguments: Any) -> bool:
    """Return whether a trace, a mode, a profiler or a tensor subclass has to see the op."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return True
    for argument in arguments:
        kind = type(argument)
        if kind is not Tensor and kind is not Parameter and isinstance(argument, Tensor):
            return True
    return False


class Handles:
    """What calls of an op have checked and planned, by their signature; forgotten when there are `MOST` of them."""

    MOST = 1024

    def __init__(self) -> None:
        self._handles: dict[Any, Any] = {}

    def find(self, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, Any]:
        """Return the signature of a call, None where it can have no handle, and its handle, None where there is none.

        Transforms and whatever watches ops need the long way. So does an argument that is not hashable or no tensor.
        """
        if watched(*tensors) or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return None, None
        try:
            signature = (
                options,
                *[None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in tensors],
            )
            return signature, self._handles.get(signature)
        except (AttributeError, TypeError):
            return None, None

    def keep(self, signature: Any, handle: Any) -> None:
        """Keep a handle for the next call of this signature."""
        if len(self._handles) >= self.MOST:
            self._handles.clear()
        self._handles[signature] = handle


def aligned(*tensors: Tensor) -> bool:
    """Return whether every tensor starts at a multiple of 16 bytes, as an access of a whole vector needs."""
    return not any(tensor.data_ptr() & 15 for tensor in tensors)


def usable(tensor: Tensor) -> bool:
    """Return whether a gradient can be read as it came: contiguous and aligned."""
    return tensor.is_contiguous() and not tensor.data_ptr() & 15


def empty_like(tensor: Tensor) -> Tensor:
    """Return an uninitialized contiguous tensor of the same shape."""
    if tensor.is_contiguous():
        return torch.empty_like(tensor)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd has to record a function of these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def run_backward(name: str, backward: Callable[..., Any], *arguments: Any) -> Any:
    """Run an op's backward pass; where a graph of it is recorded, differentiating its result is one clear error.

    Gradients are enabled inside a backward pass only under `create_graph`. `once_differentiable` does not replace
    this: where the incoming gradient does not require one itself, it detaches and the second derivative is lost
    without a message.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _DifferentiableOnce.apply(name, backward, *arguments)
    return backward(*arguments)


class _DifferentiableOnce(torch.autograd.Function):
    """A backward pass as a node of its own, which raises when it is differentiated."""

    @staticmethod
    def forward(ctx: Any, name: str, backward: Callable[..., Any], *arguments: Any) -> Any:
        ctx.name = name
        return backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f'{ctx.name} has no second derivative in Triton; use backend="torch" for it')

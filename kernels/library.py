"""Registration of the custom ops and the error of their second derivative, written once for all of them.

`torch.library` define + impl + fake with a plain `autograd.Function` around it is the cheapest registration that
`torch.compile(fullgraph=True)`, export and opcheck accept. The Functions do without `setup_context`, with which every
call would bind its signature; only `torch.func` needs it, and `backend.py` sends that to the references.

In plain eager mode not even the dispatcher is asked: `register` returns a function that calls the kernels' host code
itself. Whatever could watch or rewrite ops goes through PyTorch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

PLAIN = (Tensor, Parameter)  # no other class of tensors is handed to the kernels' host code
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
    return any(isinstance(argument, Tensor) and type(argument) not in PLAIN for argument in arguments)


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

"""The choice between the fused Triton kernels and the PyTorch reference, with its reason."""

import importlib.metadata
import importlib.util
import logging
import os
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from simsid.kernels.checks import check_choice

BACKENDS = ("auto", "triton", "torch")
OLDEST_MAJOR = 8  # the kernels use asynchronous copies and bf16 tensor cores, which came with sm_80
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton 3.6 leaves out the fence between an asynchronous copy and the warp-group product that reads what it copied
# (compute capability 9.0 and later), unless the loop around them is not pipelined.
LEAVES_OUT_FENCES = TRITON_INSTALLED and importlib.metadata.version("triton").startswith("3.6.")

_logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """The backend that runs, `"triton"` or `"torch"`, and why."""

    backend: str
    reason: str


def interpreter_on() -> bool:
    """Return whether Triton's interpreter, which runs kernels on a CPU for tests, is switched on."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


def why_not_triton(device: torch.device) -> str | None:
    """Return why no Triton kernel can run on `device`, or None where one can."""
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if device.type == "cpu" and interpreter_on():
        return None
    if device.type != "cuda":
        return f"Triton kernels run on CUDA, and the tensors are on {device.type}"
    if torch.version.hip is not None:
        return "the kernels were never tried on ROCm"
    # Not get_device_capability, which torch.compile does not fold into a constant.
    properties = torch.cuda.get_device_properties(device)
    if properties.major < OLDEST_MAJOR:
        return f"compute capability {properties.major}.{properties.minor} is older than {OLDEST_MAJOR}.0"
    return None


def fenced_stages(num_stages: int, warp_groups: bool, precision: str, *tensors: Tensor) -> int:
    """Return the stages of a loop that multiplies tensors: `num_stages`, or 1 where Triton would leave out a fence.

    A product reads the copies themselves where numbers have 16 bits, or are float32 and multiplied as `"tf32"`; those
    of `"tf32x3"` are taken apart in registers first.
    """
    copies = precision == "tf32" or any(tensor.element_size() == 2 for tensor in tensors)
    return 1 if LEAVES_OUT_FENCES and warp_groups and copies else num_stages


def why_not_differentiable() -> str | None:
    """Return why the kernels cannot serve the transform that is running, or None outside of transforms.

    The kernels have a backward pass and nothing else: `torch.func.grad` would raise an error about
    `setup_context`, and forward mode would lose its tangents without a message. Neither state has a public query;
    PyTorch's own `autograd.Function` and `forward_ad` read these two, and `torch.compile` folds both.
    """
    if torch._C._are_functorch_transforms_active():
        return "the kernels do not support torch.func transforms (grad, vmap, jvp)"
    if forward_ad._current_level >= 0:
        return "the kernels do not support forward-mode differentiation"
    return None


def choose_backend(backend: str, device: torch.device, refusal: str | None = None) -> Choice:
    """Choose the backend that runs.

    Args:
        backend: `"auto"`, `"triton"` or `"torch"`.
        device: of the tensors.
        refusal: the op's own reason against its kernel for these arguments (a dtype or shape), or None.

    Returns:
        The backend and the reason.

    Raises:
        ValueError: `backend` is not one of the three.
        RuntimeError: `"triton"` is asked for and cannot run.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "torch":
        return Choice("torch", "asked for")
    reason = why_not_triton(device) or refusal or why_not_differentiable()
    if backend == "triton":
        if reason is not None:
            raise RuntimeError(f'backend="triton" cannot run here: {reason}; use "auto" or "torch"')
        return Choice("triton", "asked for")
    if reason is None and device.type == "cpu":
        reason = "Triton's interpreter is for tests; the tensors are on cpu"
    choice = Choice("triton", "supported") if reason is None else Choice("torch", reason)
    if not torch.compiler.is_compiling():
        _logger.debug("backend %s: %s", choice.backend, choice.reason)
    return choice

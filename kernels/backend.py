"""The choice between the fused Triton kernels and the PyTorch reference, with its reason."""

import importlib.util
import logging
import os
from typing import NamedTuple

import torch

from simsid.kernels.checks import check_choice

BACKENDS = ("auto", "triton", "torch")
OLDEST_MAJOR = 8  # the kernels use asynchronous copies and bf16 tensor cores, which came with sm_80
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

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


def choose_backend(backend: str, device: torch.device, refusal: str | None = None) -> Choice:
    """Return the backend to run and its reason; raise where `"triton"` is asked for and cannot run.

    `refusal` is the op's own reason against its kernel for these arguments (a dtype or shape), or None.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "torch":
        return Choice("torch", "asked for")
    reason = why_not_triton(device) or refusal
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

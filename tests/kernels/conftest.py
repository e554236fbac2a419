"""Run the kernels in Triton's interpreter where there is no GPU.

The whole test process is interpreted: Triton reads TRITON_INTERPRET when it is first imported, so this file sets it
while tests are collected. Tests that need compiled Triton (the gates on machine code) start a subprocess without it.
"""

import importlib.metadata
import os
import sys

import pytest
import torch

from simsid.kernels.backend import TRITON_INSTALLED, interpreter_on

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") is None:
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before tests/kernels/conftest.py could switch its interpreter on")
    os.environ["TRITON_INTERPRET"] = "1"

if interpreter_on() and TRITON_INSTALLED:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    _cast_impl = InterpreterBuilder.cast_impl

    def _cast_impl_and_round(self, src, dst_type):
        """Round float32 to bfloat16 as a GPU does, where the interpreter truncates, so that one limit serves both."""
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return _cast_impl(self, src, dst_type)
        rounded = torch.from_numpy(np.array(src.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), dst_type.scalar)

    InterpreterBuilder.cast_impl = _cast_impl_and_round

if interpreter_on() and TRITON_INSTALLED and importlib.metadata.version("triton").startswith("3.6."):
    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _patch_lang_tensor_and_index(tensor, scope):
        """Let loops run to a bound that is an argument: in the interpreter a scalar is an array of one element.

        Triton 3.6 passes that to int(), which NumPy 2.4 refuses; compiled kernels are not affected.
        """
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_lang_tensor_and_index


@pytest.fixture
def poisoned():
    """Fill every uninitialized tensor with NaN (integers with their largest value), so that missing writes are seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])

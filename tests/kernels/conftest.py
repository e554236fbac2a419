"""Run the kernels in Triton's interpreter where there is no GPU.

The whole test process is interpreted: Triton reads TRITON_INTERPRET when it is first imported, so this file sets it
while tests are collected. What needs compiled Triton (the gates on machine code) runs in a subprocess without it.
"""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") is None:
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before tests/kernels/conftest.py could switch its interpreter on")
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def poisoned():
    """Fill every uninitialised tensor with NaN (integers with their largest value), so that unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])

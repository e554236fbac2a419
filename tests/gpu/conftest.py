"""Tests that only a GPU can answer: every one is marked `gpu` and skipped without CUDA.

`SIMSID_TEST_DEVICE=cpu pytest tests/gpu` runs those that need no CUDA of their own at tiny sizes on a CPU, the kernels
in Triton's interpreter: that catches mistakes in the tests, and says nothing about a GPU.
"""

import importlib.util
import os
import pathlib
import sys

import pytest
import torch

HERE = pathlib.Path(__file__).parent
KERNELS = HERE.parent / "kernels"
ON_CPU = os.environ.get("SIMSID_TEST_DEVICE") == "cpu"
REASON = "needs a GPU: torch.cuda.is_available() is false (SIMSID_TEST_DEVICE=cpu tries the tests themselves on a CPU)"

# Without a fixed workspace cuBLAS may sum in another order in the next run; it reads this when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Helpers of other folders are used here. The conftest of the kernel tests switches the interpreter on where there is no
# GPU, which must happen before anything imports Triton.
sys.path[:0] = [str(KERNELS), str(HERE.parent / "models")]
_spec = importlib.util.spec_from_file_location("kernels_conftest", KERNELS / "conftest.py")
_kernels_conftest = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_kernels_conftest)
poisoned = _kernels_conftest.poisoned


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available() and not ON_CPU:
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture
def device():
    """Return the GPU; the CPU where `SIMSID_TEST_DEVICE=cpu` asks for it."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def small(device):
    """Return whether sizes must be tiny, because the kernels are interpreted."""
    return device.type == "cpu"


@pytest.fixture
def cuda(device):
    """Skip what CUDA alone has: graphs, streams, synchronization, TensorFloat-32."""
    if device.type != "cuda":
        pytest.skip("CUDA graphs, streams and TensorFloat-32 have no counterpart on a CPU")
    return device


@pytest.fixture
def full_precision():
    """Switch TensorFloat-32 off: another order of summation would show in the third digit."""
    # Not by monkeypatch, which cannot put back an attribute that PyTorch computes.
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def deterministic(monkeypatch):
    """Use algorithms that repeat bit for bit: by default PyTorch's gradient of an upsampling adds atomically."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    # Filling uninitialized memory would slow every allocation.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Start and end without compiled code of other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()

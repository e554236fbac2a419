"""The choice of backend and its reason."""

import subprocess
import sys
import types

import pytest
import torch

from simsid.kernels import backend as module
from simsid.kernels.backend import Choice, choose_backend, why_not_triton

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")


@pytest.fixture
def gpu(monkeypatch):
    """Simulate a GPU of a given compute capability."""
    monkeypatch.setattr(module, "TRITON_INSTALLED", True)
    monkeypatch.setattr(torch.version, "hip", None)

    def simulate(major, minor):
        properties = types.SimpleNamespace(major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    simulate(9, 0)
    return simulate


def test_auto_on_cuda_takes_triton(gpu):
    assert choose_backend("auto", CUDA) == Choice("triton", "supported")


def test_auto_takes_torch_when_the_op_refuses(gpu):
    assert choose_backend("auto", CUDA, "float64 has no kernel") == Choice("torch", "float64 has no kernel")


def test_auto_on_an_old_gpu_takes_torch(gpu):
    gpu(7, 5)
    assert choose_backend("auto", CUDA) == Choice("torch", "compute capability 7.5 is older than 8.0")


def test_auto_on_a_cpu_takes_torch_even_with_the_interpreter(monkeypatch):
    for interpreted in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        choice = choose_backend("auto", CPU)
        assert choice.backend == "torch" and "cpu" in choice.reason
    assert choose_backend("auto", META).backend == "torch"


def test_auto_takes_torch_without_triton(gpu, monkeypatch):
    monkeypatch.setattr(module, "TRITON_INSTALLED", False)
    assert choose_backend("auto", CUDA) == Choice("torch", "Triton is not installed")
    assert why_not_triton(CPU) == "Triton is not installed"


def test_triton_on_a_cpu_runs_only_with_the_interpreter(monkeypatch):
    monkeypatch.setattr(module, "TRITON_INSTALLED", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("triton", CPU).backend == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r'backend="triton" cannot run here: .* on cpu; use "auto" or "torch"'):
        choose_backend("triton", CPU)


def test_triton_raises_with_the_reason_of_the_op(gpu):
    with pytest.raises(RuntimeError, match="cannot run here: float64 has no kernel"):
        choose_backend("triton", CUDA, "float64 has no kernel")


def test_auto_on_rocm_takes_torch(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in choose_backend("auto", CUDA).reason


@pytest.mark.parametrize(
    ("transform", "reason"),
    [
        (torch.func.vmap, "torch.func transforms"),
        (lambda call: torch.func.grad(lambda x: call(x).sum()), "torch.func transforms"),
        (lambda call: lambda x: torch.func.jvp(call, (x,), (x,)), "torch.func transforms"),
    ],
    ids=["vmap", "grad", "jvp"],
)
def test_auto_inside_a_transform_takes_torch_and_triton_raises(gpu, transform, reason):
    def call(x):
        choice = choose_backend("auto", CUDA)
        assert choice.backend == "torch" and reason in choice.reason
        with pytest.raises(RuntimeError, match=f'backend="triton" cannot run here: .*{reason}'):
            choose_backend("triton", CUDA)
        return 2 * x

    transform(call)(torch.ones(3))


def test_auto_in_forward_mode_takes_torch_and_triton_raises(gpu):
    with torch.autograd.forward_ad.dual_level():
        assert choose_backend("auto", CUDA).reason == "the kernels do not support forward-mode differentiation"
        with pytest.raises(RuntimeError, match="forward-mode differentiation"):
            choose_backend("triton", CUDA)
    assert choose_backend("auto", CUDA).backend == "triton"


def test_reason_is_logged(caplog):
    with caplog.at_level("DEBUG", logger="simsid.kernels.backend"):
        choose_backend("auto", META)
    assert "backend torch: Triton" in caplog.text


def test_unknown_backend_raises_one_sentence():
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'triton', 'torch', got 'cuda'"):
        choose_backend("cuda", CPU)


CALL = "from torch import ones; from simsid.kernels import space_aware_memory as op; op(ones(1, 1, 2), ones(1, 3, 2)); "


@pytest.mark.parametrize(
    "script",
    [
        CALL + "import sys; assert 'triton' not in sys.modules",
        "import sys; sys.modules['triton'] = None; " + CALL,
    ],
    ids=["not imported before it is needed", "not installed"],
)
def test_ops_run_on_a_cpu_without_triton(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("version_leaves_out", "precision", "dtype", "stages"),
    [
        (True, "tf32x3", torch.float32, 3),  # taken apart in registers before the product
        (True, "tf32", torch.float32, 1),
        (True, "tf32x3", torch.bfloat16, 1),
        (False, "tf32", torch.float16, 3),
    ],
)
def test_loops_whose_products_would_be_unfenced_are_not_pipelined(
    version_leaves_out, precision, dtype, stages, monkeypatch
):
    monkeypatch.setattr(module, "LEAVES_OUT_FENCES", version_leaves_out)
    tensor = torch.empty(1, dtype=dtype)
    assert module.fenced_stages(3, True, precision, tensor) == stages
    assert module.fenced_stages(3, False, precision, tensor) == 3

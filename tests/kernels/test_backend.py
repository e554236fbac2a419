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
    """Pretend that a GPU of some compute capability is there."""
    monkeypatch.setattr(module, "TRITON_INSTALLED", True)
    monkeypatch.setattr(torch.version, "hip", None)

    def pretend(major, minor):
        properties = types.SimpleNamespace(major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    pretend(9, 0)
    return pretend


def test_auto_takes_triton_on_cuda(gpu):
    assert choose_backend("auto", CUDA) == Choice("triton", "supported")


def test_auto_takes_torch_where_the_op_refuses(gpu):
    assert choose_backend("auto", CUDA, "float64 has no kernel") == Choice("torch", "float64 has no kernel")


def test_auto_takes_torch_on_an_old_gpu(gpu):
    gpu(7, 5)
    assert choose_backend("auto", CUDA) == Choice("torch", "compute capability 7.5 is older than 8.0")


def test_auto_takes_torch_on_a_cpu_even_under_the_interpreter(monkeypatch):
    for interpreted in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        choice = choose_backend("auto", CPU)
        assert choice.backend == "torch" and "cpu" in choice.reason
    assert choose_backend("auto", META).backend == "torch"


def test_auto_takes_torch_without_triton(gpu, monkeypatch):
    monkeypatch.setattr(module, "TRITON_INSTALLED", False)
    assert choose_backend("auto", CUDA) == Choice("torch", "Triton is not installed")
    assert why_not_triton(CPU) == "Triton is not installed"


def test_triton_runs_on_a_cpu_under_the_interpreter_alone(monkeypatch):
    monkeypatch.setattr(module, "TRITON_INSTALLED", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("triton", CPU).backend == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r'backend="triton" cannot run here: .* on cpu; use "auto" or "torch"'):
        choose_backend("triton", CPU)


def test_triton_is_refused_with_the_reason_of_the_op(gpu):
    with pytest.raises(RuntimeError, match="cannot run here: float64 has no kernel"):
        choose_backend("triton", CUDA, "float64 has no kernel")


def test_rocm_is_refused(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in choose_backend("auto", CUDA).reason


def test_the_reason_is_logged(caplog):
    with caplog.at_level("DEBUG", logger="simsid.kernels.backend"):
        choose_backend("auto", META)
    assert "backend torch: Triton" in caplog.text


def test_an_unknown_backend_is_one_error():
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
def test_the_ops_need_no_triton(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

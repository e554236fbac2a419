"""The choice between the fused kernels and the PyTorch reference."""

from simsid.kernels.checks import check_choice

BACKENDS = ("auto", "triton", "torch")


def choose_backend(backend: str) -> str:
    """Return the backend that runs: `"torch"`, the only one so far; `"triton"` is refused by name."""
    check_choice("backend", backend, BACKENDS)
    if backend == "triton":
        raise RuntimeError('backend="triton" has no kernels in this version; use "auto" or "torch"')
    return "torch"

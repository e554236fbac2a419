"""The residual + LayerNorm + ReLU op: contract, checks and choice of backend."""

import torch
from torch import Tensor

from simsid.kernels.backend import choose_backend
from simsid.kernels.checks import check_tensor
from simsid.kernels.layer_norm.reference import residual_layer_norm_reference
from simsid.kernels.ranges import named_range

MAX_FEATURES = 8192  # of a row that one Triton program holds in registers; longer rows run in PyTorch


@named_range
def residual_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, backend: str = "auto"
) -> Tensor:
    """Normalise the last axis of `x`, add `residual` and apply ReLU, in one pass over memory.

        out = relu((x - mean(x)) / sqrt(var(x) + eps) * weight + bias + residual)

    `var` is the biased variance of a row.

    Source: SQUID (arXiv 2111.13495) and SimSID (arXiv 2403.08689), the in-painting block: attention and feed-forward
    each end in it, with the block's running feature as the residual.

    Args:
        x: `[..., D]`, float16 to float64.
        residual: the shape of `x`, any of those dtypes, same device.
        weight: `[D]`, any of those dtypes.
        bias: `[D]`, any of those dtypes.
        eps: positive, added to the variance.
        backend: `"auto"` (the fused kernel on CUDA, PyTorch elsewhere), `"triton"` or `"torch"`.

    Returns:
        The shape of `x`, in the wider dtype of `x` and `residual`, computed in float32 (float64 for float64).
        Gradients reach all four tensors and are zero where the output is.

    Raises:
        TypeError: a dtype or type that is not listed above.
        ValueError: a shape, device, `eps` or `backend` that does not fit.
    """
    check_tensor("x", x, tuple(x.shape) if isinstance(x, Tensor) and x.dim() else ("...", "D"))
    features = x.shape[-1]
    if not features:
        raise ValueError(f"x must have at least one feature, got shape {list(x.shape)}")
    for name, tensor, shape in (
        ("residual", residual, tuple(x.shape)),
        ("weight", weight, (features,)),
        ("bias", bias, (features,)),
    ):
        check_tensor(name, tensor, shape)
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")
    if not 0.0 < eps < float("inf"):
        raise ValueError(f"eps must be a positive number, got {eps!r}")
    refusal = None
    if torch.float64 in (x.dtype, residual.dtype):
        refusal = "float64 has no kernel"
    elif features > MAX_FEATURES:
        refusal = f"rows of {features} features are longer than the {MAX_FEATURES} that one program can hold"
    if choose_backend(backend, x.device, refusal).backend == "triton":
        from simsid.kernels.layer_norm.fused import residual_layer_norm_fused

        return residual_layer_norm_fused(x, residual, weight, bias, eps)
    return residual_layer_norm_reference(x, residual, weight, bias, eps)

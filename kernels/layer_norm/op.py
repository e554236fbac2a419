"""The residual + LayerNorm + ReLU op: contract, checks and choice of backend."""

from torch import Tensor

from simsid.kernels.backend import choose_backend
from simsid.kernels.checks import check_positive, check_tensor
from simsid.kernels.handles import Handles
from simsid.kernels.layer_norm.plan import refuse
from simsid.kernels.layer_norm.reference import residual_layer_norm_reference
from simsid.kernels.ranges import named_range

_handles = Handles()


@named_range
def residual_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, backend: str = "auto"
) -> Tensor:
    """Normalize the last axis of `x`, add `residual` and apply ReLU, in one pass over memory.

        out = relu((x - mean(x)) / sqrt(var(x) + eps) * weight + bias + residual)

    `var` is the biased variance of a row.

    Source: SQUID (arXiv 2111.13495) and SimSID (arXiv 2403.08689), the in-painting block: attention and feed-forward
    each end in it, with the block's running feature as the residual.

    Args:
        x: `[..., D]`, float16 to float64.
        residual: the shape of `x`, any of those dtypes, same device.
        weight: `[D]`, any of those dtypes.
        bias: `[D]`, any of those dtypes.
        eps: positive number, added to the variance.
        backend: `"auto"` (the fused kernel on CUDA, PyTorch elsewhere), `"triton"` or `"torch"`. The kernels have no
            second derivative, no forward mode and no `torch.func` transforms; inside the last two, `"auto"` takes
            PyTorch.

    Returns:
        The shape of `x`, in the wider dtype of `x` and `residual`, computed in float32 (float64 for float64).
        Gradients reach all four tensors and are zero where the output is.

    Raises:
        TypeError: a dtype or type that is not listed above.
        ValueError: a shape, device, `eps` or `backend` that does not fit.
        RuntimeError: `backend="triton"` where the kernels cannot run, with the reason.
    """
    tensors = (x, residual, weight, bias)
    signature, handle = _handles.find(tensors, (eps, backend))
    if handle is not None:
        return handle.launch(tensors)
    check_tensor("x", x, tuple(x.shape) if isinstance(x, Tensor) and x.dim() else ("...", "D"))
    features = x.shape[-1]
    if not features:
        raise ValueError(f"x must have at least one feature, got shape {list(x.shape)}")
    check_tensor("residual", residual, tuple(x.shape), like=("x", x))
    check_tensor("weight", weight, (features,), like=("x", x))
    check_tensor("bias", bias, (features,), like=("x", x))
    check_positive("eps", eps)
    refusal = refuse(x.dtype, residual.dtype, features)
    if choose_backend(backend, x.device, refusal).backend == "triton":
        from simsid.kernels.layer_norm import fused

        if signature is not None:
            _handles.keep(signature, tensors, fused.passes(residual.dtype, bias.dtype, float(eps)))
        return fused.residual_layer_norm_fused(*tensors, float(eps))
    return residual_layer_norm_reference(x, residual, weight, bias, float(eps))

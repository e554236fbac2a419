"""LayerNorm, residual and ReLU in plain PyTorch: the truth that the fused kernel is tested against."""

import torch
from torch import Tensor
from torch.nn import functional


def residual_layer_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute the op's docstring in float32 or better, autocast off."""
    out = torch.promote_types(x.dtype, residual.dtype)
    dtype = torch.promote_types(out, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        normed = functional.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
        return torch.relu(normed + residual.to(dtype)).to(out)

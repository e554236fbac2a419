"""Residual, LayerNorm and ReLU in plain PyTorch: the reference that the fused kernels are tested against."""

import torch
from torch import Tensor
from torch.nn import functional


def residual_layer_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute the op of `op.py` in float32 or wider, with autocast off; arguments already checked."""
    out_dtype = torch.promote_types(x.dtype, residual.dtype)
    dtype = torch.promote_types(out_dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        normed = functional.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
        return torch.relu(normed + residual.to(dtype)).to(out_dtype)

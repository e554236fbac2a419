"""The ops of simsid, usable on their own: plain PyTorch everywhere, fused Triton kernels on CUDA."""

from simsid.kernels.attention.op import neighbor_attention
from simsid.kernels.layer_norm.op import residual_layer_norm
from simsid.kernels.memory.op import space_aware_memory

__all__ = ["neighbor_attention", "residual_layer_norm", "space_aware_memory"]

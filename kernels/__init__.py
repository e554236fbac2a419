"""The ops of simsid, usable on their own: plain PyTorch everywhere, fused Triton kernels on CUDA."""

from simsid.kernels.neighbor_attention.op import neighbor_attention
from simsid.kernels.residual_layer_norm.op import residual_layer_norm
from simsid.kernels.space_aware_memory.op import space_aware_memory

__all__ = ["neighbor_attention", "residual_layer_norm", "space_aware_memory"]

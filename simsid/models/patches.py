"""Cuts images into patches and merges them again; the patch index is the fastest in the batch."""

import torch
from torch import Tensor


def split(images: Tensor, patches: int) -> Tensor:
    """Cut `[B, C, H, W]` into `[B * P*P, C, H/P, W/P]`, locations row-major and fastest."""
    B, C, H, W = images.shape
    h, w = H // patches, W // patches
    cut = images.view(B, C, patches, h, patches, w).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(B * patches * patches, C, h, w)


def merge(maps: Tensor, patches: int) -> Tensor:
    """Merge `[B * P*P, C, h, w]` to `[B, C, P*h, P*w]`, in the same memory format; the inverse of `split`."""
    BL, C, h, w = maps.shape
    B = BL // (patches * patches)
    if is_channels_last(maps):
        grid = maps.permute(0, 2, 3, 1).view(B, patches, patches, h, w, C).permute(0, 1, 3, 2, 4, 5)
        return grid.reshape(B, patches * h, patches * w, C).permute(0, 3, 1, 2)
    grid = maps.view(B, patches, patches, C, h, w).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(B, C, patches * h, patches * w)


def is_channels_last(maps: Tensor) -> bool:
    """Whether `[B, C, h, w]` lies in memory with the channels fastest, and is not also contiguous."""
    return maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()

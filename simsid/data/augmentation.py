"""Batched augmentation on the images' own device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from simsid.arguments import require_instance, require_number
from simsid.errors import InputError

DARKEST = -1.0


def augment(
    images: Tensor,
    *,
    translate: float = 0.05,
    scale: float = 0.05,
    generator: torch.Generator | None = None,
    draws: Tensor | None = None,
) -> Tensor:
    """Translate and scale each image at random, bilinearly, filling with the darkest value.

    Output pixel `x` is read at `(x - t) / s`, in coordinates centered on the image: `t` is uniform within `±translate`
    of the image's size for each axis, `s` uniform within `1 ± scale`.

    Source: SQUID (arXiv 2111.13495) and SimSID (arXiv 2403.08689), which augment with translation and scaling.

    Args:
        images: `[B, 1, H, W]`, floating point, in -1..1, on any device.
        translate: largest shift as a fraction of height and of width, at least 0.
        scale: largest change of size as a fraction, in [0, 1).
        generator: source of the 3 B random numbers, on its own device, so that a CPU generator gives the same numbers
            whatever the device of the images; None is PyTorch's default generator on the CPU.
        draws: `[B, 3]` in 0..1, those numbers (shift down, shift right, scale), instead of drawing them.

    Returns:
        `[B, 1, H, W]`, same dtype and device; `images` itself where both ranges are 0.

    Raises:
        InputError: a parameter outside its range, or another shape.
    """
    require_instance("images", images, Tensor)
    translate, scale = require_number("translate", translate), require_number("scale", scale)
    if images.dim() != 4:
        raise InputError(f"images must be [B, 1, H, W], got shape {list(images.shape)}")
    if translate < 0:
        raise InputError(f"translate must not be negative, got {translate}")
    if not 0 <= scale < 1:
        raise InputError(f"scale must lie in [0, 1), got {scale}")
    if translate == 0 and scale == 0:
        return images
    if draws is None:
        source = generator.device if generator is not None else "cpu"
        draws = torch.rand(images.shape[0], 3, generator=generator, device=source)
    elif draws.shape != (len(images), 3):
        raise InputError(f"draws must be [{len(images)}, 3], got shape {list(draws.shape)}")
    draws = draws * 2 - 1
    size = 1 + scale * draws[:, 2]
    # The sampling grid spans -1..1, two units for one image: a shift by the fraction t of the image is 2 t.
    shift = -2 * translate * draws[:, :2] / size[:, None]
    theta = torch.zeros(images.shape[0], 2, 3, device=draws.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / size
    theta[:, :, 2] = shift
    # Coordinates in half precision would be off by a pixel.
    dtype = torch.promote_types(images.dtype, torch.float32)
    theta = theta.to(dtype)
    if images.is_cuda and not theta.is_cuda:
        # A copy from pageable memory would make the host wait for all queued work of the device.
        theta = theta.pin_memory()
    grid = F.affine_grid(theta.to(images.device, non_blocking=True), list(images.shape), align_corners=False)
    # grid_sample fills with zero, so the darkest value is shifted to zero; edges blend towards it.
    lifted = images.to(dtype) - DARKEST
    moved = F.grid_sample(lifted, grid, padding_mode="zeros", align_corners=False) + DARKEST
    return moved.to(images.dtype)

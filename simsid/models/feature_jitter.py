"""Jittered copies of normal images, which show a feature memory what position, exposure and sharpness may change."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

DRAWS = 10  # random numbers of one image
BLUR_RADIUS = 4  # pixels at most on each side; three times the widest sigma of 1.2, rounded up
ZOOM, VERTICAL, ROTATION, SHIFT = 0.10, 0.05, math.radians(6), 0.05
GAMMA, CONTRAST, BRIGHTNESS = 0.35, 0.25, 0.08
UNSHARP_SIGMA = 1.2


def jitter(images: Tensor, draws: Tensor) -> Tensor:
    """Return one jittered copy of each image.

    Zoom by exp U(-0.10, 0.10) with an extra vertical exp U(-0.05, 0.05), rotation within 6 degrees and shift within 5 %
    of the side, the border replicated; values clipped to their 1 and 99 % quantiles, then gamma exp U(-0.35, 0.35),
    contrast exp U(-0.25, 0.25) and brightness within 0.08 of the range; then blurred or sharpened.

    Args:
        images: `[B, 1, H, W]` in -1..1.
        draws: `[B, 10]` uniform numbers in 0..1, one row an image, so that a copy does not depend on the batch.

    Returns:
        `[B, 1, H, W]` in -1..1.
    """
    draws = draws.to(images.device, images.dtype)
    signed = draws * 2 - 1
    y = moved((images + 1) / 2, signed[:, :5])
    low, high = torch.quantile(y.flatten(1), torch.tensor([0.01, 0.99]).to(y), dim=1)[:, :, None, None, None]
    y = torch.minimum(torch.maximum(y, low), high)
    gamma, contrast, brightness = (value[:, None, None, None] for value in signed[:, 5:8].unbind(1))
    y = y.clamp(1e-4, 1) ** (gamma * GAMMA).exp()
    mean = y.mean((1, 2, 3), keepdim=True)
    y = (y - mean) * (contrast * CONTRAST).exp() + mean + brightness * BRIGHTNESS
    return _resharpened(y, draws[:, 8] * 1.6 - 0.6).clamp(0, 1) * 2 - 1


def moved(y: Tensor, signed: Tensor) -> Tensor:
    """Zoom, stretch, rotate and shift `[B, 1, H, W]` about the center by `[B, 5]`, 1 for the full range of `jitter`."""
    zoom, vertical, turn, down, right = signed.unbind(1)
    across = (zoom * ZOOM).exp()
    along = across * (vertical * VERTICAL).exp()
    cosine, sine = (turn * ROTATION).cos(), (turn * ROTATION).sin()
    height, width = y.shape[2:]
    # The grid maps output to input, in units of half a side: the inverse of diag(across, along) times a rotation.
    theta = torch.stack(
        [
            torch.stack([cosine / across, sine / along * (height / width)], 1),
            torch.stack([-sine / across * (width / height), cosine / along], 1),
        ],
        1,
    )
    shift = torch.stack([right, down], 1)[:, :, None] * (2 * SHIFT)
    theta = torch.cat([theta, -theta @ shift], 2)
    grid = F.affine_grid(theta, list(y.shape), align_corners=False)
    return F.grid_sample(y, grid, padding_mode="border", align_corners=False)


def _resharpened(y: Tensor, sharpness: Tensor) -> Tensor:
    """Blur by sigma = s where s > 0.15; add -s times the detail below sigma 1.2 where s < -0.05."""
    sigma = torch.where(sharpness > 0.15, sharpness, UNSHARP_SIGMA)
    blurred = gaussian_blur(y, sigma)
    s = sharpness[:, None, None, None]
    return torch.where(s > 0.15, blurred, torch.where(s < -0.05, y - s * (y - blurred), y))


def gaussian_blur(y: Tensor, sigma: Tensor, radius: int = BLUR_RADIUS) -> Tensor:
    """Blur every image `[B, 1, H, W]` by its own sigma `[B]`, in pixels; the border is reflected.

    The kernel ends at `radius` pixels, which the default makes enough for a sigma of 1.3.
    """
    offsets = torch.arange(-radius, radius + 1, device=y.device, dtype=y.dtype)
    kernel = torch.softmax(-0.5 * (offsets / sigma[:, None]) ** 2, 1)
    padded = F.pad(y, [radius] * 4, mode="reflect").transpose(0, 1)
    rows = F.conv2d(padded, kernel[:, None, :, None], groups=len(y))
    return F.conv2d(rows, kernel[:, None, None, :], groups=len(y)).transpose(0, 1)

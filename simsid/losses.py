"""The losses of generator and discriminator. Source: SimSID, section 3.5 (equations 4-8); SQUID, section 3.6."""

import torch
from torch import Tensor
from torch.nn import functional as F


def distillation_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Return the sum over up blocks of the mean squared difference of their feature maps; detached on neither side."""
    return torch.stack([F.mse_loss(s.float(), t.float()) for s, t in zip(student, teacher, strict=True)]).sum()


def reconstruction_loss(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the mean squared error of `[B, 1, H, W]`."""
    return F.mse_loss(reconstruction.float(), images.float())


def adversarial_loss(logits: Tensor, real: bool) -> Tensor:
    """Return the binary cross entropy of `[B]` logits against "real" or "fake"."""
    return F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, float(real), dtype=torch.float32))

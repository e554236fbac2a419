"""The losses of generator and discriminator. Source: SimSID, section 3.5 (equations 4-8); SQUID, section 3.6."""

import torch
from torch import Tensor
from torch.nn import functional as F


def distillation_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Return the sum over up blocks of the mean squared difference of their feature maps; neither is detached."""
    return torch.stack([F.mse_loss(_wide(s), _wide(t)) for s, t in zip(student, teacher, strict=True)]).sum()


def reconstruction_loss(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the mean squared error of `[B, 1, H, W]`."""
    return F.mse_loss(_wide(reconstruction), _wide(images))


def adversarial_loss(logits: Tensor, real: bool) -> Tensor:
    """Return the binary cross entropy of `[B]` logits against "real" or "fake"."""
    logits = _wide(logits)
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def _wide(x: Tensor) -> Tensor:
    """Return `x` in float32 at least, in which losses are summed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

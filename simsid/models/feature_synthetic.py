"""A linear classifier between normal images and copies with painted opacities, on pooled features."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST_OPACITIES = 2
DRAWS = 1 + 4 * MOST_OPACITIES  # random numbers of one image
# Wide and faint: with radii of 0.04 to 0.14 and strengths of 0.12 to 0.4 the classifier learns to see the spots alone
# (its AUC on ZhangLab's validation films, fitted to 300 films: 57 %, with these numbers 67 %).
RADIUS, STRENGTH = (0.15, 0.40), (0.05, 0.15)  # of the image's side; of the range from black to white
SOFTNESS = 15  # the mask's edge is as wide as the side divided by this
PENALTY = 0.01  # C of scikit-learn's logistic regression


def paint(images: Tensor, draws: Tensor, mask: Tensor) -> Tensor:
    """Add one or two soft bright spots to each image, inside `mask`.

    Args:
        images: `[B, 1, H, W]` in -1..1.
        draws: `[B, 9]` uniform numbers in 0..1, one row an image.
        mask: bool `[H, W]`, not all False.

    Returns:
        `[B, 1, H, W]` in -1..1.
    """
    draws = draws.to(images)
    height, width = mask.shape
    edge = height // SOFTNESS * 2 + 1
    inside = mask.to(images)[None, None]
    inside = F.avg_pool2d(inside, edge, 1, edge // 2, count_include_pad=False)[0, 0]
    centers = mask.to(images.device).nonzero()
    y = torch.arange(height, device=images.device, dtype=images.dtype)[:, None]
    x = torch.arange(width, device=images.device, dtype=images.dtype)
    count = (draws[:, 0] * MOST_OPACITIES).long() + 1
    added = torch.zeros_like(images[:, 0])
    for i in range(MOST_OPACITIES):
        where, down, across, strength = draws[:, 1 + 4 * i : 5 + 4 * i].unbind(1)
        center = centers[(where * len(centers)).long().clamp_max(len(centers) - 1)].to(images.dtype)[:, :, None, None]
        rows, columns = ((RADIUS[0] + u * (RADIUS[1] - RADIUS[0]))[:, None, None] * height for u in (down, across))
        spot = torch.exp(-(((y - center[:, 0]) / rows) ** 2 + ((x - center[:, 1]) / columns) ** 2) / 2)
        peak = (STRENGTH[0] + strength * (STRENGTH[1] - STRENGTH[0])) * (i < count)
        added += spot * peak[:, None, None]
    return (images + 2 * (added * inside)[:, None]).clamp(-1, 1)


class SyntheticClassifier(nn.Module):
    """Logistic regression on the pooled features of the deepest two layers: its logit, in units of normal images.

        score = (w (x - mean) / std - mu) / sigma

    Source: anomalies pasted into normal images as a training signal, CutPaste (arXiv 2104.04015) and FPI (arXiv
    2011.04197); here they only train a linear layer on frozen features.
    """

    mean: Tensor
    std: Tensor
    coefficients: Tensor
    normal: Tensor

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        size = sum(channels[-2:])
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.register_buffer("coefficients", torch.zeros(size))
        self.register_buffer("normal", torch.tensor([0.0, 1.0]))

    @torch.no_grad()
    def fit(self, clean: Sequence[Tensor], jittered: Sequence[Tensor], painted: Sequence[Tensor]) -> Tensor:
        """Fit to pooled features `[n, C]` of each layer and return the clean images' scores, cross-fitted: `[n]`."""
        normal, moved, abnormal = (torch.cat(list(layers[-2:]), 1) for layers in (clean, jittered, painted))
        self.mean, self.std = normal.mean(0), normal.std(0) + 1e-6
        parts = [(x - self.mean) / self.std for x in (normal, moved, abnormal)]
        fold = torch.arange(len(normal), device=normal.device) * 2 // len(normal)
        logits = normal.new_zeros(len(normal))
        for i in (0, 1):
            coefficients = self._regression(*(x[fold != i] for x in parts))
            logits[fold == i] = parts[0][fold == i] @ coefficients
        self.coefficients = self._regression(*parts)
        return self.measure_normal(logits)

    def measure_normal(self, logits: Tensor) -> Tensor:
        """Take mean and deviation of normal images' logits `[n]` as the unit; returns them in that unit."""
        self.normal = torch.stack([logits.mean(), logits.std() + 1e-6])
        return self.standardized(logits)

    def standardized(self, logits: Tensor) -> Tensor:
        """Return logits in units of normal images' deviation."""
        return (logits - self.normal[0]) / self.normal[1]

    @torch.no_grad()
    def forward(self, pooled: Sequence[Tensor]) -> Tensor:
        """Return the logit of pooled features: `[B, C]` of each layer to `[B]`."""
        # A product and a sum, not a matrix product: no row depends on its batch.
        return ((torch.cat(list(pooled[-2:]), 1) - self.mean) / self.std * self.coefficients).sum(1)

    def _regression(self, normal: Tensor, moved: Tensor, abnormal: Tensor) -> Tensor:
        from sklearn.linear_model import LogisticRegression

        x = torch.cat([normal, moved, abnormal]).double().cpu().numpy()
        y = [0] * (len(normal) + len(moved)) + [1] * len(abnormal)
        fitted = LogisticRegression(C=PENALTY, class_weight="balanced", max_iter=1000).fit(x, y)
        # The intercept cancels against mu.
        return torch.from_numpy(fitted.coef_[0]).to(normal)

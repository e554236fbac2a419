"""The discriminator, whose logit is the anomaly score."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simsid.errors import InputError
from simsid.models.batch_norm import BatchNorm2d

CONVOLUTIONS = 5


class Discriminator(nn.Module):
    """Five 5x5 convolutions of stride 2 over the whole image and a linear layer to one logit (real = positive).

    `width` channels in the first map, twice as many in each further one; 16 in the papers.

    Source: SQUID, section 3.6 and supplementary material; SimSID, section 3.5.
    """

    def __init__(self, image_size: int, width: int = 16) -> None:
        super().__init__()
        channels = [1, *(width * 2**i for i in range(CONVOLUTIONS))]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels[i], channels[i + 1], 5, stride=2, padding=2) for i in range(CONVOLUTIONS)
        )
        self.norms = nn.ModuleList(BatchNorm2d(count) for count in channels[2:])
        side = -(-image_size // 2**CONVOLUTIONS)
        self.output = nn.Linear(channels[-1] * side * side, 1)

    def forward(self, images: Tensor, statistics: Literal["module", "per_image"] = "module") -> Tensor:
        """Return the logits `[B]` of `[B, 1, H, W]`.

        `statistics="module"` normalizes as BatchNorm does in its present mode. `"per_image"` normalizes each image with
        its own statistics (biased variance), as the released evaluation does at batch size 1, and leaves the
        running statistics alone.

        Raises:
            InputError: another value of `statistics`.
        """
        return _logit(self.features(images, statistics), self.output.weight, self.output.bias)

    def features(self, images: Tensor, statistics: Literal["module", "per_image"] = "module") -> Tensor:
        """Return what the last convolution makes of `[B, 1, H, W]`, normalized and activated.

        `[B, C, h, w]`; C is 16 times the width, h and w a thirty-second of H and W, rounded up.
        """
        if statistics not in ("module", "per_image"):
            raise InputError(f"statistics must be 'module' or 'per_image', got {statistics!r}")
        x = F.leaky_relu(self.convolutions[0](images), 0.2, inplace=True)
        for convolution, norm in zip(self.convolutions[1:], self.norms):
            x = convolution(x)
            x = norm(x) if statistics == "module" else _instance_norm(x, norm)
            x = F.leaky_relu(x, 0.2, inplace=True)
        return x

    def grad_cam(self, images: Tensor, statistics: Literal["module", "per_image"] = "module") -> Tensor:
        """Return where the last convolution's features raise the negated logit: `[B, 1, H, W]` to `[B, h, w]`.

            map = ReLU(sum_k a_k F_k),   a_k = mean over positions of d(-logit) / d F_k

        Source: Grad-CAM (arXiv 1610.02391), equations 1 and 2; SimSID, figure 7. The map has no graph and is float32
        or wider; h and w are a thirty-second of H and W, rounded up.
        """
        # A caller may be in inference mode, whose tensors cannot take part in autograd: differentiate copies.
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                found = self.features(images, statistics)
            with torch.inference_mode(False), torch.enable_grad():
                features, weight, bias = (x.detach().clone() for x in (found, self.output.weight, self.output.bias))
                logit = _logit(features.requires_grad_(), weight, bias)
                (gradient,) = torch.autograd.grad(-logit.sum(), features)
            wide = torch.promote_types(features.dtype, torch.float32)
            importance = gradient.to(wide).mean((2, 3), keepdim=True)
            return (importance * features.detach().to(wide)).sum(1).relu()


def _logit(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply the linear layer to `[B, C, h, w]`; returns `[B]`, float32 or wider."""
    # A sum of each row, where a matrix product's order of summation depends on the row's index in the batch.
    x = features.flatten(1).to(torch.promote_types(features.dtype, torch.float32))
    return (x * weight).sum(1) + bias


def _instance_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """Normalize every image with its own statistics, at the scale and shift that BatchNorm learned."""
    assert isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
    return F.instance_norm(x, weight=norm.weight, bias=norm.bias, eps=norm.eps)

"""The discriminator, whose logit is the anomaly score."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = (16, 32, 64, 128, 256)


class Discriminator(nn.Module):
    """Five 5x5 convolutions of stride 2 over the whole image and a linear layer to one logit (real = positive).

    Source: SQUID, section 3.6 and supplementary material; SimSID, section 3.5.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        widths = (1, *CHANNELS)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], 5, stride=2, padding=2) for i in range(len(CHANNELS))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in CHANNELS[1:])
        side = -(-image_size // 2 ** len(CHANNELS))
        self.output = nn.Linear(CHANNELS[-1] * side * side, 1)

    def forward(self, images: Tensor, statistics: Literal["module", "per_image"] = "module") -> Tensor:
        """Return the logits `[B]` of `[B, 1, H, W]`.

        `statistics="module"` normalises as BatchNorm does in its present mode. `"per_image"` normalises each image with
        its own statistics (biased variance), as the released evaluation does at batch size 1, and leaves the
        running statistics alone.
        """
        if statistics not in ("module", "per_image"):
            raise ValueError(f"statistics must be 'module' or 'per_image', got {statistics!r}")
        x = F.leaky_relu(self.convolutions[0](images), 0.2, inplace=True)
        for convolution, norm in zip(self.convolutions[1:], self.norms):
            x = convolution(x)
            x = norm(x) if statistics == "module" else _instance_norm(x, norm)
            x = F.leaky_relu(x, 0.2, inplace=True)
        # A sum of each row, where a matrix product's order of summation depends on the row's place in the batch.
        x = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
        return (x * self.output.weight).sum(1) + self.output.bias


def _instance_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """Normalize every image with its own statistics, at the scale and shift that BatchNorm learned."""
    assert isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
    return F.instance_norm(x, weight=norm.weight, bias=norm.bias, eps=norm.eps)

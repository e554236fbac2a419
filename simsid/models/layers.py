"""The building blocks of encoder and decoders."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simsid.models.batch_norm import BatchNorm2d


def conv_bn(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """Return conv3x3 (bias, padding 1) and BatchNorm (eps 1e-5, momentum 0.1)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1),
        BatchNorm2d(out_channels),
    )


class ConvBlock(nn.Module):
    """Residual block of three convolutions.

        c1 = ReLU(BN(conv3x3(x, stride)))
        y  = ReLU(c1 + BN(conv3x3(ReLU(BN(conv3x3(c1))))))

    `[B, in, H, W] -> [B, out, ceil(H / stride), ceil(W / stride)]`. Source: SQUID, supplementary material, networks.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.entry = conv_bn(in_channels, out_channels, stride)
        self.inner = conv_bn(out_channels, out_channels)
        self.outer = conv_bn(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        # In place saves a third of the memory and its traffic; no backward pass needs what is overwritten.
        c1 = F.relu(self.entry(x), inplace=True)
        c2 = F.relu(self.inner(c1), inplace=True)
        return F.relu(self.outer(c2).add_(c1), inplace=True)


class VariationalBottleneck(nn.Module):
    """Draws a quarter of the channels from a normal distribution that the input decides; in inference, their mean.

        z = mean(x) + exp(log_variance(x) / 2) * noise,   y = ReLU(BN(conv1x1(z)))

    Source: Kingma, Welling, Auto-encoding variational Bayes (arXiv 1312.6114), section 3 and appendix B.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.moments = nn.Conv2d(channels, channels // 4 * 2, 1)
        self.exit = nn.Sequential(nn.Conv2d(channels // 4, channels, 1), BatchNorm2d(channels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of `[B, C, h, w]` again, and the summed divergence from the standard normal, in nats."""
        moments = self.moments(x)
        mean, log_variance = moments.to(torch.promote_types(moments.dtype, torch.float32)).chunk(2, dim=1)
        z = mean + (log_variance / 2).exp() * torch.randn_like(mean) if self.training else mean
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2
        return F.relu(self.exit(z), inplace=True), divergence

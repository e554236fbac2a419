"""The building block of encoder and decoders."""

from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """Return conv3x3 (bias, padding 1) and BatchNorm (eps 1e-5, momentum 0.1)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1),
        nn.BatchNorm2d(out_channels),
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

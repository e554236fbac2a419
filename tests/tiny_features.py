"""A tiny encoder and 32-pixel images that the tests of feature models share."""

import torch
from torch import nn
from torch.nn import functional as F

from simsid import FeatureMemory

SIZES = {"image_size": 32, "components": 6, "items": 5, "topk": 2, "grid": 4, "weight": "uniform", "neighbors": 2}


class TinyEncoder(nn.Module):
    """Two random convolutions of a gray image; returns both maps, 8 x 8 and 4 x 4."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second = nn.Conv2d(1, 6, 5, 4, 2), nn.Conv2d(6, 8, 3, 2, 1)

    def forward(self, x):
        first = torch.tanh(self.first(x) * 3)
        return first, torch.tanh(self.second(first) * 3)


def normal(count, seed=0):
    """Smooth images `[count, 1, 32, 32]`: one pattern, slightly shifted, stretched and noisy."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.linspace(-1, 1, 32)
    shift = (torch.rand(count, 2, generator=generator) - 0.5) * 0.2
    rows = torch.sin(3 * (y + shift[:, :1]))[:, :, None]
    columns = torch.cos(2 * (y + shift[:, 1:]))[:, None]
    noise = torch.rand(count, 32, 32, generator=generator) * 0.1
    return (0.6 * rows * columns + noise - 0.05)[:, None].clamp(-1, 1)


def abnormal(count, seed=1):
    """Normal images with a bright spot in the upper left quarter."""
    images = normal(count, seed)
    spot = F.pad(torch.full((1, 1, 9, 9), 1.2), (4, 19, 4, 19))
    return (images + spot).clamp(-1, 1)


def shifted(images):
    """Return images as another machine would take them: darker, of less contrast."""
    return images * 0.7 - 0.25


def memory(**changes):
    """Return a feature memory of the tiny encoder, not fitted."""
    return FeatureMemory(**{"encoder": TinyEncoder(), **SIZES, "inputs": "gray", **changes})


def auc(low, high):
    """Return the probability that a value of `high` is above one of `low`."""
    return float((torch.as_tensor(high)[:, None] > torch.as_tensor(low)).double().mean())

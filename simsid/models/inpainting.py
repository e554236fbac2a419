"""The in-painting block: a patch is rebuilt from what the memories of its neighbors return."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simsid.config import Config
from simsid.kernels import neighbor_attention, residual_layer_norm
from simsid.kernels.ranges import stage
from simsid.models.batch_norm import BatchNorm2d
from simsid.models.memory import SpaceAwareMemory


class Inpainted(NamedTuple):
    """What the block returns: the features `[B * L, C, h, w]`, and its queries and their look-up, `[B, L, D]` each."""

    features: Tensor
    query: Tensor
    retrieved: Tensor


class NeighborAttention(nn.Module):
    """Multi-head attention of each location to its eight neighbors, projections included.

    Query, key and value are projected once per location, never once per window; a neighbor outside the grid is a zero
    feature (`border="zero"`: key = key bias, value = value bias) or takes no part (`"mask"`).
    Source: SimSID, section 3.3; SQUID, section 3.4.
    """

    def __init__(self, features: int, grid: tuple[int, int], heads: int, border: str, backend: str) -> None:
        super().__init__()
        self.grid, self.heads, self.border, self.backend = grid, heads, border, backend
        self.query = nn.Linear(features, features)
        self.key_value = nn.Linear(features, 2 * features)
        self.output = nn.Linear(features, features)
        for layer in (self.query, self.key_value, self.output):
            nn.init.zeros_(layer.bias)
        # Each of the three square blocks is drawn as one of PyTorch's packed projection: Xavier over [3 D, D].
        bound = math.sqrt(6 / (4 * features))
        for layer in (self.query, self.key_value):
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """Attend from `query` to `memory`, both `[B, L, D]`; returns `[B, L, D]`."""
        pads = self.key_value.bias if self.border == "zero" else None
        # Keys and values stay side by side as their product wrote them: so does their gradient, without a copy.
        q, k_and_v = self.query(query), self.key_value(memory)
        attended = neighbor_attention(q, k_and_v, None, self.grid, self.heads, pad_key=pads, backend=self.backend)
        return self.output(attended)


class InpaintingBlock(nn.Module):
    """Replace the deepest features of every patch by what its memory and its neighbors make of them.

        f = ReLU(BN(conv1x1(x)));   n = memory(f)
        n = ReLU(LN(attention(f, neighbors of n)) + n);   n = ReLU(LN(FF(n)) + n)
        y = ReLU(BN(conv1x1([n, binary index planes])))

    Source: SimSID, section 3.3; SQUID, section 3.4, and its masked shortcut (`rho < 1`). With
    `inpainting="convolution"` a 3x3 convolution over the grid of patch features stands in for the attention; with
    `"memory"` the look-up alone remains.
    """

    index_planes: Tensor

    def __init__(self, config: Config, backend: str = "auto") -> None:
        super().__init__()
        C, D, L, P = config.deepest_channels, config.bottleneck_features, config.locations, config.patches
        self.locations, self.patches, self.rho, self.kind = L, P, config.rho, config.inpainting
        self.backend = backend
        self.entry = nn.Sequential(nn.Conv2d(C, C // 4, 1, bias=False), BatchNorm2d(C // 4))
        self.memory = SpaceAwareMemory(config, L, config.items, D, queue=config.memory == "queue", backend=backend)
        self.mixing: nn.Module
        if self.kind == "attention":
            self.mixing = NeighborAttention(D, (P, P), config.heads, config.border, backend)
        elif self.kind == "convolution":
            self.mixing = nn.Conv2d(D, D, 3, padding=1)
        if self.kind != "memory":
            self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
            self.feed_forward = nn.Sequential(
                nn.Linear(D, max(D // 4, 1)),
                nn.Dropout(config.dropout),
                nn.ReLU(),
                nn.Linear(max(D // 4, 1), D),
                nn.Dropout(config.dropout),
            )
        bits = L.bit_length()  # floor(log2 L) + 1
        # From Python's integers: an operator such as & on the meta device, where a loaded model is built first, imports
        # torch._dynamo for seconds.
        planes = [[location >> bit & 1 for bit in range(bits - 1, -1, -1)] for location in range(L)]
        self.register_buffer("index_planes", torch.tensor(planes, dtype=torch.float32), persistent=False)
        self.exit = nn.Sequential(nn.Conv2d(C // 4 + bits, C, 1), BatchNorm2d(C))

    def forward(self, x: Tensor) -> Inpainted:
        """Rebuild `[B * L, C, h, w]`; in training with `rho < 1` some positions keep their input."""
        BL, _, h, w = x.shape
        B = BL // self.locations
        f = F.relu(self.entry(x), inplace=True).reshape(B, self.locations, -1)
        with stage("in-painting memory"):
            n = retrieved = self.memory(f)
        if self.kind != "memory":
            n = self._add(self._mix(f, n), n, self.norm1)
            n = self._add(self.feed_forward(n), n, self.norm2)
        planes = self.index_planes.to(n.dtype).repeat(B, 1)[:, :, None, None].expand(-1, -1, h, w)
        y = F.relu(self.exit(torch.cat([n.reshape(BL, -1, h, w), planes], dim=1)), inplace=True)
        if self.training and self.rho < 1:
            keep = torch.rand(BL, 1, h, w, device=x.device) < self.rho
            y = torch.where(keep, y, x)
        return Inpainted(y, f, retrieved)

    def _add(self, x: Tensor, n: Tensor, norm: nn.LayerNorm) -> Tensor:
        """Return ReLU(LN(x) + n)."""
        return residual_layer_norm(x, n, norm.weight, norm.bias, norm.eps, backend=self.backend)

    def _mix(self, f: Tensor, n: Tensor) -> Tensor:
        if self.kind == "attention":
            return self.mixing(f, n)
        grid = n.transpose(1, 2).unflatten(2, (self.patches, self.patches))
        return self.mixing(grid).flatten(2).transpose(1, 2)

"""Encoder and generators: the student, with memories, and the teacher, without."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simsid.config import Config
from simsid.kernels.ranges import stage
from simsid.models import patches
from simsid.models.inpainting import InpaintingBlock
from simsid.models.layers import ConvBlock, VariationalBottleneck
from simsid.models.memory import DecoderMemory


class Encoded(NamedTuple):
    """Deepest features `[B * L, C, h, w]` and the skips, shallowest first."""

    deepest: Tensor
    skips: list[Tensor]


class Generated(NamedTuple):
    """A reconstruction `[B, 1, H, W]` and the feature map after each up block (and its memory).

    `query`, `retrieved`: the in-painting block's queries and their look-up, `[B, L, D]`, or None without the block.
    `divergence`: of a variational autoencoder, in nats a pixel, else None.
    `decoder_queries`: the feature map that each decoder memory was given; its look-up is in `features`.
    """

    images: Tensor
    features: list[Tensor]
    query: Tensor | None
    retrieved: Tensor | None
    divergence: Tensor | None
    decoder_queries: list[Tensor]


class Encoder(nn.Module):
    """Patch-wise encoder: a ConvBlock, then one of stride 2 for every level. Source: SQUID, supplementary material."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        channels = config.channels
        self.entry = ConvBlock(1, channels[0])
        self.down = nn.ModuleList(ConvBlock(channels[i], channels[i + 1], stride=2) for i in range(config.levels))

    def forward(self, images: Tensor) -> Encoded:
        """Encode patches `[B * L, 1, S, S]`; skip `i` is the input of down block `i`."""
        with stage("encoder"):
            x = self.entry(images)
            skips = []
            for block in self.down:
                skips.append(x)
                x = block(x)
            return Encoded(x, skips)


class Generator(nn.Module):
    """Decoder from the deepest features to an image in -1..1; the student's has the in-painting block and the memories.

    Up block `i` upsamples to the size of skip `levels - 1 - i`, takes that skip as input too if it is among the
    `skip_levels` deepest, and has its channels. The patches are merged before the last `merge_levels` blocks.
    Source: SimSID, sections 3.1 and 3.4; SQUID, section 3.5 (hierarchical memory, student and teacher).
    """

    def __init__(self, config: Config, *, student: bool, backend: str = "auto") -> None:
        super().__init__()
        self.patches, self.skip_levels = config.patches, config.skip_levels
        self.merge_at = config.levels - config.merge_levels
        channels = config.channels
        inpaints = student and config.inpainting != "none"
        self.inpainting = InpaintingBlock(config, backend) if inpaints else None
        self.bottleneck = VariationalBottleneck(channels[-1]) if student and config.variational else None
        self.up, self.memories = nn.ModuleList(), nn.ModuleList()
        for i in range(config.levels):
            skip = config.levels - 1 - i
            joined = channels[skip] if i < config.skip_levels else 0
            self.up.append(ConvBlock(channels[skip + 1] + joined, channels[skip]))
            if student and i < config.decoder_memories:
                size = config.patch_size // 2**skip
                self.memories.append(
                    DecoderMemory(config, channels[skip], size, merged=i >= self.merge_at, backend=backend)
                )
        self.output = nn.Conv2d(channels[0], 1, 1)

    def forward(self, deepest: Tensor, skips: list[Tensor]) -> Generated:
        """Decode `[B * L, C, h, w]` and the encoder's skips."""
        x, query, retrieved, divergence = deepest, None, None, None
        if self.inpainting is not None:
            with stage("in-painting"):
                x, query, retrieved = self.inpainting(x)
        if self.bottleneck is not None:
            x, divergence = self.bottleneck(x)
        features: list[Tensor] = []
        queries: list[Tensor] = []
        for i, block in enumerate(self.up):
            skip = skips[len(skips) - 1 - i]
            if i == self.merge_at:
                x = patches.merge(x, self.patches)
            size = [n * self.patches if i >= self.merge_at else n for n in skip.shape[-2:]]
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
            if i < self.skip_levels:
                if i >= self.merge_at:
                    skip = patches.merge(skip, self.patches)
                x = torch.cat([skip, x], dim=1)
            x = block(x)
            if i < len(self.memories):
                queries.append(x)
                with stage(f"decoder memory {i}"):
                    x = self.memories[i](x)
            features.append(x)
        if self.merge_at == len(self.up):
            x = patches.merge(x, self.patches)
        images = torch.tanh(self.output(x))
        if divergence is not None:
            divergence = divergence / images.numel()
        return Generated(images, features, query, retrieved, divergence, queries)

"""Encoder and generators: the student, with memories, and the teacher, without."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simsid.config import Config
from simsid.errors import InputError, InputTypeError
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


class CustomEncoder(nn.Module):
    """Any module in the place of `Encoder`, trained with the generators as that is.

    Args:
        config: determines the shapes. Of patches `[B * L, 1, S, S]` the module yields `levels + 1` maps, shallowest
            first: map `i` is `[B * L, channels[i], S / 2^i, S / 2^i]`, the last one the deepest.
        network: the module, which returns a list, tuple or dictionary of these maps.

    Raises:
        InputTypeError: `network` is not a module.
        InputError: it yields other maps.
    """

    def __init__(self, config: Config, network: nn.Module) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise InputTypeError(f"encoder must be a torch.nn.Module, got {type(network).__name__}")
        self.network = network
        parameter = next(network.parameters(), None)
        # A copy on the meta device is only compared with a file: its module was checked, and need not run there.
        if parameter is None or not parameter.is_meta:
            self._check(config, torch.device("cpu") if parameter is None else parameter.device)

    @property
    def name(self) -> str:
        """Module and class of the network, as a saved model names it."""
        return f"{type(self.network).__module__}.{type(self.network).__qualname__}"

    def forward(self, images: Tensor) -> Encoded:
        """Encode patches `[B * L, 1, S, S]`."""
        with stage("encoder"):
            maps = self.network(images)
            *skips, deepest = maps.values() if isinstance(maps, Mapping) else maps
            return Encoded(deepest, skips)

    @torch.no_grad()
    def _check(self, config: Config, device: torch.device) -> None:
        S = config.patch_size
        training = {module: module.training for module in self.network.modules()}
        try:
            maps = self.network.eval()(torch.zeros(1, 1, S, S, device=device))
        except RuntimeError as error:
            raise InputError(f"encoder must take a float32 patch [1, 1, {S}, {S}], and raised: {error}") from error
        finally:
            for module, mode in training.items():
                module.training = mode
        maps = list(maps.values()) if isinstance(maps, Mapping) else maps
        want = [[1, C, S // 2**i, S // 2**i] for i, C in enumerate(config.channels)]
        is_list = isinstance(maps, (list, tuple)) and all(isinstance(x, Tensor) for x in maps)
        if is_list and any(x.dtype != torch.float32 for x in maps):
            raise InputError(f"encoder must yield float32 maps, got {', '.join(str(x.dtype) for x in maps)}")
        shapes = [list(x.shape) for x in maps] if is_list else type(maps).__name__
        if shapes != want:
            raise InputError(f"encoder must yield maps of the shapes {want} for a patch [1, 1, {S}, {S}], got {shapes}")


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

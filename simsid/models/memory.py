"""Memories: learned items or a queue of real features, looked up by location."""

import torch
from torch import Tensor, nn

from simsid.config import Config
from simsid.kernels import space_aware_memory
from simsid.models import patches


class SpaceAwareMemory(nn.Module):
    """Replaces each query by the items of its own location that resemble it most.

        out = w M,   w = shrink(softmax(z M^T))

    Source: SimSID, section 3.2 (equations 1-3); the queue: SQUID, section 3.3. `items` is a parameter `[L, N, D]`
    (`[1, N, D]` when `config.space_aware` is off), or with `queue=True` a buffer of the latest real features that gets
    no gradient and that `push` updates. A queue that is not full yet shows its random first items.
    """

    items: Tensor
    pointer: Tensor

    def __init__(
        self, config: Config, locations: int, items: int, features: int, *, queue: bool = False, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.topk = items if config.shrinkage == "none" else config.topk
        self.threshold = "inclusive" if config.shrinkage == "none" else config.threshold
        self.hard_threshold = config.hard_threshold if config.shrinkage == "hard" else None
        self.temperature = config.temperature
        self.gumbel_noise = config.gumbel_noise
        self.backend = backend
        content = torch.empty(locations if config.space_aware else 1, items, features)
        content.uniform_(-(features**-0.5), features**-0.5)
        self.is_queue = queue
        if queue:
            self.register_buffer("items", content)
            self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        else:
            self.items = nn.Parameter(content)

    def forward(self, query: Tensor) -> Tensor:
        """Look `[B, L, D]` up; returns `[B, L, D]`."""
        noise = None
        if self.gumbel_noise and self.training:
            uniform = torch.rand(*query.shape[:2], self.items.shape[1], device=query.device)
            noise = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(uniform.dtype).tiny)))
        if self.hard_threshold is not None:
            return hard_shrinkage_memory(query, self.items, self.hard_threshold, noise, self.temperature)
        return space_aware_memory(
            query,
            self.items,
            self.topk,
            threshold=self.threshold,
            noise=noise,
            temperature=self.temperature,
            backend=self.backend,
        )

    @torch.no_grad()
    def weights(self, query: Tensor) -> Tensor:
        """Return the weight of every item in the look-ups of `[B, L, D]`, 0 for those not kept: `[B, L, N]`."""
        if self.hard_threshold is not None:
            return _hard_weights(query, self.items, self.hard_threshold, None, self.temperature)[0]
        settings = {"threshold": self.threshold, "temperature": self.temperature, "backend": "torch"}
        _, index, weight = space_aware_memory(query, self.items, self.topk, return_weights=True, **settings)
        dense = weight.new_zeros(*query.shape[:2], self.items.shape[1])
        return dense.scatter(-1, index, weight)

    @torch.no_grad()
    def push(self, query: Tensor, unless: Tensor | None = None) -> None:
        """Append a step's queries `[B, L, D]` to the queue, in batch order; they overwrite the oldest items.

        Nothing changes where the boolean scalar `unless` is true; it stays on the device, so the host need not wait.
        """
        if self.items.shape[0] == 1:
            query = query.flatten(0, 1)[:, None]
        N = self.items.shape[1]
        new = query.detach().transpose(0, 1)[:, -N:].to(self.items.dtype)
        # Queries beyond N would be overwritten at once, but advance the pointer like the others.
        first = self.pointer + max(query.shape[0] - N, 0)
        slots = (first + torch.arange(new.shape[1], device=self.items.device)) % N
        moved = (self.pointer + query.shape[0]) % N
        if unless is not None:
            new = torch.where(unless, self.items[:, slots], new)
            moved = torch.where(unless, self.pointer, moved)
        self.items[:, slots] = new
        self.pointer.copy_(moved)

    def extra_repr(self) -> str:
        """Return the sizes for `print(model)`."""
        L, N, D = self.items.shape
        return f"locations={L}, items={N}, features={D}, topk={self.topk}, queue={self.is_queue}"


def hard_shrinkage_memory(
    query: Tensor, items: Tensor, threshold: float, noise: Tensor | None, temperature: float
) -> Tensor:
    """Look `[B, L, D]` up with hard shrinkage at a fixed threshold, through which the gradient flows.

        w = max(p - t, 0) p / (|p - t| + 1e-12),  divided by its sum

    Source: MemAE (arXiv 1904.02639), equations 6 and 7.
    """
    w, M = _hard_weights(query, items, threshold, noise, temperature)
    with torch.autocast(query.device.type, enabled=False):
        return torch.einsum("bln,lnd->bld", w, M).to(query.dtype)


def _hard_weights(
    query: Tensor, items: Tensor, threshold: float, noise: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the weights `[B, L, N]` of a hard shrinkage, and the items `[L, N, D]` in their precision."""
    with torch.autocast(query.device.type, enabled=False):
        z = query.to(torch.promote_types(query.dtype, torch.float32))
        M = items.to(z.dtype).expand(query.shape[1], -1, -1)
        s = torch.einsum("bld,lnd->bln", z, M)
        p = torch.softmax((s if noise is None else s + noise) / temperature, dim=-1)
        w = torch.relu(p - threshold) * p / ((p - threshold).abs() + 1e-12)
        return w / w.sum(-1, keepdim=True).clamp_min(1e-12), M


class DecoderMemory(nn.Module):
    """The memory after a decoder block; it maps a feature map to one of the same shape.

    `"patch"` (the papers): one location a patch, `D` = channels x height x width of the patch's map. `"subpatch"` (the
    released code): each patch's map is cut into 2 x 2 sub-windows; they are the locations, shared by all patches.
    Items are flattened channel-major. A map of all patches together is cut into them first (`merged=True`).
    """

    def __init__(self, config: Config, channels: int, size: int, *, merged: bool, backend: str = "auto") -> None:
        super().__init__()
        self.patches = config.patches
        self.merged = merged
        self.subpatch = config.decoder_memory == "subpatch"
        self.locations = 4 if self.subpatch else config.locations
        positions = (size // 2) ** 2 if self.subpatch else size**2
        self.memory = SpaceAwareMemory(
            config, self.locations, config.decoder_items, channels * positions, backend=backend
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Look up `[B * L, C, h, w]`, or `[B, C, H, W]` when merged; shape and memory format stay."""
        layout = torch.channels_last if patches.is_channels_last(maps) else torch.contiguous_format
        if self.merged:
            maps = patches.split(maps, self.patches)
        windows = patches.split(maps, 2) if self.subpatch else maps
        found = self.memory(windows.reshape(-1, self.locations, windows[0].numel())).reshape(windows.shape)
        if self.subpatch:
            found = patches.merge(found, 2)
        if self.merged:
            found = patches.merge(found, self.patches)
        # Convert here, where the map is small: the next block would convert it after upsampling.
        return found.contiguous(memory_format=layout)

    def distance(self, maps: Tensor, found: Tensor) -> Tensor:
        """Return the Euclidean distance of each location's features from their look-up, float32 `[B, h, w]`.

        Args:
            maps: what `forward` took.
            found: what it returned.
        """
        difference = maps.float() - found.float()
        if self.merged:
            difference = patches.split(difference, self.patches)
        windows = patches.split(difference, 2) if self.subpatch else difference
        distance = windows.flatten(1).norm(dim=1)[:, None, None, None]
        if self.subpatch:
            distance = patches.merge(distance, 2)
        return patches.merge(distance, self.patches)[:, 0]

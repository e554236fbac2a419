"""A memory of whole images: the mean features of normal images, in units of what jittering an image changes."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS = ("lungs", "uniform")
LUNG_CENTERS = ((69 / 224, 107 / 224), (156 / 224, 107 / 224))
LUNG_RADII = (42 / 224, 80 / 224)  # a fifth wider than the lungs: in a film that is not centered they still lie inside
CANVAS = 224
CHUNK = 256  # queries compared with the memory at a time; bounds the distance matrix


@functools.lru_cache(maxsize=32)
def location_weight(choice: str | tuple[tuple[float, ...], ...], grid: tuple[int, int]) -> Tensor:
    """Return how much each location of a grid counts, `[h, w]` with sum 1.

    Args:
        choice: `"lungs"`, two upright ellipses where the lungs of a frontal radiograph lie; `"uniform"`; or the rows of
            a map of the image, which is averaged to the grid.
        grid: `(h, w)`.
    """
    if isinstance(choice, str):
        weight = torch.ones(CANVAS, CANVAS) if choice == "uniform" else lung_mask(CANVAS, CANVAS).float()
    else:
        weight = torch.tensor(choice, dtype=torch.float32)
    weight = F.interpolate(weight[None, None], size=grid, mode="area")[0, 0]
    return weight / weight.sum()


def lung_mask(height: int, width: int) -> Tensor:
    """Return two upright ellipses where the lungs of a frontal radiograph lie: bool `[height, width]`."""
    y = ((torch.arange(height) + 0.5) / height)[:, None]
    x = ((torch.arange(width) + 0.5) / width)[None]
    (across, along), mask = LUNG_RADII, torch.zeros(height, width, dtype=torch.bool)
    for column, row in LUNG_CENTERS:
        mask |= ((x - column) / across) ** 2 + ((y - row) / along) ** 2 <= 1
    return mask


def pool(maps: Sequence[Tensor], choice: str | tuple[tuple[float, ...], ...]) -> list[Tensor]:
    """Return the weighted mean over the locations of each map: `[B, C, h, w]` to `[B, C]`."""
    return [(x * location_weight(choice, (x.shape[2], x.shape[3])).to(x)).sum((2, 3)) for x in maps]


class PooledMemory(nn.Module):
    """One memory a layer of pooled normal features; an image's distance to the nearest ones is its anomaly.

        x = (pool(f) - mean) / std
        S = (x' - x)^T (x' - x) / n = U e U^T,    T = U (e + mean e)^-1/2        x': the jittered copies
        d(q) = mean over the k nearest m of |q T - m|,    m: x T and x' T of normal images
        score = mean over layers of (d - mu) / sigma,     mu, sigma: distances of normal images, own rows excluded

    The transform divides by what position, exposure and sharpness change, so that these count little.

    Source: the space-aware memory of SimSID (arXiv 2403.08689), section 3.2, with one location, the lungs; the distance
    is that of k-nearest-neighbor detectors (PatchCore, arXiv 2106.08265). `simsid.kernels.space_aware_memory` returns
    a mean of items where distances are wanted, so this look-up is plain PyTorch: one distance matrix and a top-k.

    Rows are kept in float16 and compared in float32, a saved memory scores as before. `owner` numbers the image of each
    row: an image that is in the memory can be judged without its own rows. Images added by `add` come after the
    fitted ones; `truncate` forgets them.
    """

    owner: Tensor
    normal_mean: Tensor
    normal_std: Tensor

    def __init__(self, channels: Sequence[int], neighbors: int = 5, images: int = 0) -> None:
        super().__init__()
        self.channels, self.neighbors = tuple(channels), neighbors
        for i, count in enumerate(self.channels):
            self.register_buffer(f"mean{i}", torch.zeros(count))
            self.register_buffer(f"std{i}", torch.ones(count))
            # torch.eye on the meta device, where a loaded model is built first, would import torch._dynamo for seconds.
            self.register_buffer(f"transform{i}", torch.zeros(count, count))
            self.register_buffer(f"rows{i}", torch.zeros(2 * images, count, dtype=torch.float16))
        self.register_buffer("owner", torch.zeros(2 * images, dtype=torch.int64))
        self.register_buffer("normal_mean", torch.zeros(len(self.channels)))
        self.register_buffer("normal_std", torch.ones(len(self.channels)))

    @torch.no_grad()
    def fit(self, clean: Sequence[Tensor], jittered: Sequence[Tensor]) -> Tensor:
        """Fill the memory from `[n, C]` of each layer and return the images' scores, own rows excluded: `[n]`."""
        for i, (x, moved) in enumerate(zip(clean, jittered)):
            mean, std = x.mean(0), x.std(0) + 1e-6
            change = (moved - x) / std
            values, vectors = torch.linalg.eigh(change.T @ change / len(x))
            values = values.clamp_min(0)
            self._set(f"mean{i}", mean)
            self._set(f"std{i}", std)
            self._set(f"transform{i}", vectors * (values + values.mean() + 1e-12).rsqrt())
        self._clear()
        return self.add(clean, jittered)

    @torch.no_grad()
    def add(self, clean: Sequence[Tensor], jittered: Sequence[Tensor]) -> Tensor:
        """Add images `[n, C]` of each layer, measure normal distances on them, and return their scores: `[n]`."""
        first, count = self.images, len(clean[0])
        owner = torch.arange(first, first + count, device=self.owner.device)
        for i, (x, moved) in enumerate(zip(clean, jittered)):
            new = torch.cat([self._transformed(i, x), self._transformed(i, moved)]).half()
            self._set(f"rows{i}", torch.cat([getattr(self, f"rows{i}"), new]))
        self._set("owner", torch.cat([self.owner, owner, owner]))
        distances = self.distances(clean, owner)
        self._set("normal_mean", distances.mean(0))
        self._set("normal_std", distances.std(0) + 1e-6)
        return self.standardized(distances)

    @property
    def images(self) -> int:
        """Number of images in the memory."""
        return len(self.owner) // 2

    @torch.no_grad()
    def distances(self, pooled: Sequence[Tensor], owner: Tensor | None = None) -> Tensor:
        """Return the mean distance to the nearest rows: `[B, C]` of each layer to `[B, layers]`.

        Args:
            pooled: pooled features, one tensor a layer.
            owner: `[B]`, the number of each image where it is in the memory: its own rows are left out; -1 where it is
                not.
        """
        columns = []
        for i, x in enumerate(pooled):
            query, rows = self._transformed(i, x), self._rows(i)
            parts = []
            # An exported program has no loop over a batch of any size.
            starts = [0] if torch.compiler.is_exporting() else range(0, len(query), CHUNK)
            for start in starts:
                part = slice(None) if torch.compiler.is_exporting() else slice(start, start + CHUNK)
                # Differences, not |a|^2 - 2ab + |b|^2, which is inexact for near rows.
                d = torch.cdist(query[part], rows, compute_mode="donot_use_mm_for_euclid_dist")
                if owner is not None:
                    d = d.masked_fill(owner[part, None].eq(self.owner), torch.inf)
                parts.append(d.topk(min(self.neighbors, d.shape[1]), dim=1, largest=False).values.mean(1))
            columns.append(torch.cat(parts) if parts else x.new_zeros(0))
        return torch.stack(columns, 1)

    def joined_rows(self) -> Tensor:
        """Return the rows of all layers side by side, each in units of normal images' distance: `[n, sum of C]`."""
        return torch.cat([self._rows(i) / self.normal_mean[i] for i in range(len(self.channels))], 1)

    def joined(self, pooled: Sequence[Tensor]) -> Tensor:
        """Return pooled features of images as `joined_rows` has those of the memory: `[B, sum of C]`."""
        return torch.cat([self._transformed(i, x) / self.normal_mean[i] for i, x in enumerate(pooled)], 1)

    def nearest(self, pooled: Sequence[Tensor]) -> Tensor:
        """Return the numbers of the k images nearest to each query, itself left out: `[B, min(k, images - 1)]`.

        Distances are those of the layers side by side; of an image's two rows the nearer one counts.
        """
        distance = torch.cdist(self.joined(pooled), self.joined_rows())
        distance = distance.masked_fill(self.own_rows(pooled)[:, None].eq(self.owner), torch.inf)
        owner = self.owner.expand(len(distance), -1)
        each = distance.new_full((len(distance), self.images), torch.inf).scatter_reduce(1, owner, distance, "amin")
        return each.topk(min(self.neighbors, self.images - 1), dim=1, largest=False).indices

    def standardized(self, distances: Tensor) -> Tensor:
        """Return the score of `[B, layers]` distances: `[B]`, 0 for an average normal image."""
        return ((distances - self.normal_mean) / self.normal_std).mean(1)

    def forward(self, pooled: Sequence[Tensor], owner: Tensor | None = None) -> Tensor:
        """Return the score of pooled features: `[B, C]` of each layer to `[B]`."""
        return self.standardized(self.distances(pooled, owner))

    @torch.no_grad()
    def own_rows(self, pooled: Sequence[Tensor]) -> Tensor:
        """Return the number of the image in the memory that each query is, or -1: `[B]`."""
        query, rows = self._transformed(0, pooled[0]), self._rows(0)
        d, index = torch.cdist(query, rows, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        # Rows are rounded to float16, by 2^-11 of their size; other images lie orders of magnitude farther away.
        same = d <= 2.0**-9 * (query.norm(dim=1) + 1e-6)
        return torch.where(same, self.owner[index], -1)

    def truncate(self, images: int) -> None:
        """Forget all but the first `images` images."""
        keep = self.owner < images
        for i in range(len(self.channels)):
            self._set(f"rows{i}", getattr(self, f"rows{i}")[keep])
        self._set("owner", self.owner[keep])

    def _rows(self, i: int) -> Tensor:
        return getattr(self, f"rows{i}").float()

    def _transformed(self, i: int, x: Tensor) -> Tensor:
        mean, std, transform = (getattr(self, f"{name}{i}") for name in ("mean", "std", "transform"))
        return ((x - mean) / std) @ transform

    def _clear(self) -> None:
        for i, count in enumerate(self.channels):
            self._set(f"rows{i}", torch.zeros(0, count, dtype=torch.float16))
        self._set("owner", torch.zeros(0, dtype=torch.int64))

    def _set(self, name: str, value: Tensor) -> None:
        # Contiguous, as a loaded tensor is: a product sums in another order for another layout.
        setattr(self, name, value.detach().contiguous().to(self.normal_mean.device))

"""In-painting in feature space: each location predicted from what the memory returns for its eight neighbors."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simsid.kernels import space_aware_memory

CHUNK = 128  # images whose neighborhoods are held at a time while fitting
KMEANS_STEPS = 5


def to_grid(maps: Sequence[Tensor], grid: int) -> Tensor:
    """Average maps `[B, C, h, w]` to `grid` x `grid` locations, side by side: `[B, grid * grid, sum of C]`."""
    return torch.cat([F.adaptive_avg_pool2d(x, grid) for x in maps], 1).flatten(2).transpose(1, 2)


class FeatureInpainting(nn.Module):
    """Space-aware memory of projected features, and a linear prediction of each location from its neighbors' look-ups.

        y = ((f - mean) / std) P                                      P: leading principal components
        n[l] = sum over the top-k items m of l of softmax(-|y[l] - m|^2 / D) m
        r[l] = y[l] - W[l] [n of the eight neighbors of l, 1]          zeros outside the grid
        map[l] = sqrt(mean over features of r[l]^2 / v[l])             v: variance of r in normal images
        score = (weighted mean of map - mu) / sigma

    Source: SimSID (arXiv 2403.08689), sections 3.2 and 3.3: space-aware memory, and the in-painting of a location from
    its neighbors with the center hidden. Differences: the items are k-means centers of normal features and the
    prediction is a ridge regression for each location, both fitted in closed form in seconds; attention with eight
    heads, as in the papers, mixes all directions with the same projection and cannot express one matrix a direction,
    so `simsid.kernels.neighbor_attention` is not used here. The look-up is `simsid.kernels.space_aware_memory`:
    `-|y - m|^2 / D = 2 (y m - |m|^2 / 2) / D - |y|^2 / D`, a dot product with a bias (`noise`) for each item at
    temperature D / 2; the last term cancels.

    Items and matrices are kept in float16 and used in float32.
    """

    mean: Tensor
    std: Tensor
    projection: Tensor
    items: Tensor
    prediction: Tensor
    variance: Tensor
    weight: Tensor
    normal: Tensor

    def __init__(self, channels: int, grid: int, components: int, items: int, topk: int) -> None:
        super().__init__()
        self.grid, self.topk = grid, topk
        L, D = grid * grid, components
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("projection", torch.zeros(channels, D))
        self.register_buffer("items", torch.zeros(L, items, D, dtype=torch.float16))
        self.register_buffer("prediction", torch.zeros(L, 8 * D + 1, D, dtype=torch.float16))
        self.register_buffer("variance", torch.ones(L, D))
        self.register_buffer("weight", torch.full((L,), 1 / L))
        self.register_buffer("normal", torch.tensor([0.0, 1.0]))  # mean and deviation of normal images' scores

    @torch.no_grad()
    def fit(self, features: Tensor, images: int, penalty: float, weight: Tensor, seed: int = 0) -> Tensor:
        """Fit everything and return the scores of the first `images` images, cross-fitted: `[images]`.

        Args:
            features: `[n * images, L, C]` of `to_grid`: the clean images, then jittered copies in the same order.
            images: number of images.
            penalty: of the ridge regression, for each image; the bias is not penalized.
            weight: `[L]`, sum 1: how much each location counts in the score.
            seed: of the k-means centers.
        """
        self.weight = weight.to(self.weight)
        self._fit_projection(features)
        y = torch.cat([self.project(part.float()) for part in features.split(CHUNK)])
        self.items = kmeans(y, self.items.shape[1], seed).half()
        look_up = torch.cat([self.look_up(part) for part in y.split(CHUNK)])
        # Copies of an image lie in one fold.
        fold = (torch.arange(len(y), device=y.device) % images) * 2 // images
        moments = [self._moments(look_up[fold == i], y[fold == i]) for i in (0, 1)]
        error = torch.empty_like(y)
        for i in (0, 1):
            prediction = _ridge(moments[1 - i], penalty)
            error[fold == i] = self._residual(y[fold == i], look_up[fold == i], prediction)
        both = [a + b for a, b in zip(*moments)]
        self.prediction = _ridge(both, penalty).half()
        self.variance = error.square().mean(0).clamp_min(1e-12)
        return self.measure_normal(self._map(error[:images]) @ self.weight)

    def measure_normal(self, scores: Tensor) -> Tensor:
        """Take mean and deviation of normal images' raw scores `[n]` as the unit; returns them in that unit."""
        self.normal = torch.stack([scores.mean(), scores.std() + 1e-6]).to(self.normal)
        return self.standardized(scores)

    def standardized(self, scores: Tensor) -> Tensor:
        """Return raw scores in units of normal images' deviation."""
        return (scores - self.normal[0]) / self.normal[1]

    def project(self, features: Tensor) -> Tensor:
        """Standardize and project `[B, L, C]` to `[B, L, D]`."""
        return ((features - self.mean) / self.std) @ self.projection

    def look_up(self, y: Tensor) -> Tensor:
        """Return the mean of the nearest items of each location, `[B, L, D]` to `[B, L, D]`."""
        items = self.items.to(y.dtype)
        bias = (items.square().sum(2) * -0.5).expand(y.shape[0], -1, -1)
        return space_aware_memory(y, items, self.topk, noise=bias, temperature=y.shape[2] / 2)

    def weights(self, y: Tensor) -> Tensor:
        """Return the weight of every item in the look-ups of `[B, L, D]`, 0 for those not kept: `[B, L, N]`."""
        items = self.items.to(y.dtype)
        bias = (items.square().sum(2) * -0.5).expand(y.shape[0], -1, -1)
        _, index, weight = space_aware_memory(
            y, items, self.topk, noise=bias, temperature=y.shape[2] / 2, return_weights=True, backend="torch"
        )
        return weight.new_zeros(*y.shape[:2], items.shape[1]).scatter(-1, index, weight)

    @torch.no_grad()
    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the raw score `[B]` and its map `[B, grid, grid]` of `[B, L, C]` features."""
        y = self.project(features)
        locations = self._map(self._residual(y, self.look_up(y), self.prediction.float()))
        return (locations * self.weight).sum(1), locations.unflatten(1, (self.grid, self.grid))

    def _fit_projection(self, features: Tensor) -> None:
        count = features.shape[0] * features.shape[1]
        self.mean = torch.stack([part.float().sum((0, 1)) for part in features.split(CHUNK)]).sum(0) / count
        square = torch.stack([(part.float() - self.mean).square().sum((0, 1)) for part in features.split(CHUNK)]).sum(0)
        self.std = (square / count).sqrt() + 1e-6
        covariance = torch.zeros(len(self.mean), len(self.mean), device=self.mean.device)
        for part in features.split(CHUNK):
            flat = ((part.float() - self.mean) / self.std).flatten(0, 1)
            covariance += flat.T @ flat / count
        vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1)
        self.projection = vectors[:, : self.projection.shape[1]].contiguous()

    def _neighborhood(self, look_up: Tensor) -> Tensor:
        """Return the eight neighbors' look-ups and a 1 for each location: `[B, L, D]` to `[B, L, 8 D + 1]`."""
        grid = look_up.unflatten(1, (self.grid, self.grid))
        padded = F.pad(grid, (0, 0, 1, 1, 1, 1))
        steps = [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
        around = [padded[:, i : i + self.grid, j : j + self.grid] for i, j in steps]
        return torch.cat([*around, torch.ones_like(grid[..., :1])], 3).flatten(1, 2)

    def _moments(self, look_up: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normal equations' two sums for each location, and the number of images."""
        L, size = y.shape[1], self.prediction.shape[1]
        square, product = y.new_zeros(L, size, size), y.new_zeros(L, size, y.shape[2])
        for part, target in zip(look_up.split(CHUNK), y.split(CHUNK)):
            context = self._neighborhood(part).transpose(0, 1)
            square.baddbmm_(context.transpose(1, 2), context)
            product.baddbmm_(context.transpose(1, 2), target.transpose(0, 1))
        return square, product, y.new_tensor(len(y))

    def _residual(self, y: Tensor, look_up: Tensor, prediction: Tensor) -> Tensor:
        def predict(part: Tensor) -> Tensor:
            return torch.bmm(self._neighborhood(part).transpose(0, 1), prediction).transpose(0, 1)

        if torch.compiler.is_exporting():  # a program has no loop over a batch of any size
            return y - predict(look_up)
        parts = [target - predict(part) for part, target in zip(look_up.split(CHUNK), y.split(CHUNK))]
        return torch.cat(parts) if parts else y

    def _map(self, residual: Tensor) -> Tensor:
        return (residual.square() / self.variance).mean(2).sqrt()


def _ridge(moments: Sequence[Tensor], penalty: float) -> Tensor:
    """Solve `(square + penalty count I) W = product` for each location, the bias (the last input) not penalized."""
    square, product, count = moments
    diagonal = torch.full_like(square[0, 0], penalty).mul_(count)
    diagonal[-1] = 0
    # One location at a time: with two threads on a CPU the batched torch.linalg.solve of PyTorch 2.13 fails for 385
    # inputs and more ("Pivots given to lu_solve must all be greater or equal to 1").
    factors = [torch.linalg.cholesky(matrix + torch.diag(diagonal)) for matrix in square]
    return torch.stack([torch.cholesky_solve(target, factor) for target, factor in zip(product, factors)])


@torch.no_grad()
def kmeans(y: Tensor, items: int, seed: int) -> Tensor:
    """Return `items` k-means centers of each location after five steps: `[n, L, D]` to `[L, items, D]`.

    A center without members keeps its value. Fewer samples than items: the centers repeat samples.
    """
    generator = torch.Generator().manual_seed(seed)
    points = y.transpose(0, 1).contiguous()
    order = torch.stack([torch.randperm(len(y), generator=generator) for _ in range(len(points))]).to(y.device)
    order = order[:, torch.arange(items, device=y.device) % len(y)]
    centers = points.gather(1, order[:, :, None].expand(-1, -1, y.shape[2]))
    for _ in range(KMEANS_STEPS):
        nearest = torch.cat([torch.cdist(part, centers).argmin(2) for part in points.split(4096, 1)], 1)
        # A product with the assignments, not scatter_add_, whose float atomics on a GPU sum in another order each time.
        assigned = (nearest[:, None] == torch.arange(items, device=y.device)[:, None]).to(y.dtype)
        sums, counts = assigned @ points, assigned.sum(2)
        centers = torch.where(counts[..., None] > 0, sums / counts[..., None].clamp_min(1), centers)
    return centers

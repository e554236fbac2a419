"""The fitted parts of a feature memory and the signals that they give together."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simsid.errors import InputError
from simsid.models.feature_config import FeatureConfig
from simsid.models.feature_inpainting import FeatureInpainting
from simsid.models.feature_pooled import PooledMemory, location_weight
from simsid.models.feature_sample import FeatureSample
from simsid.models.feature_synthetic import SyntheticClassifier


class FeatureParts(nn.Module):
    """Pooled memory, in-painting and, where configured, the classifier against painted opacities.

        combined = pooled_memory + a inpainting + b synthetic        a, b: weights of the configuration

    Args:
        config: sizes and weights.
        channels: channels of each layer of the pooled memory.
        grid_channels: channels of the in-painting's locations.
        images: images that the pooled memory has room for, where its tensors are loaded.
    """

    def __init__(self, config: FeatureConfig, channels: Sequence[int], grid_channels: int, images: int = 0) -> None:
        super().__init__()
        self.weights = {"pooled_memory": 1.0, "inpainting": config.inpainting_weight}
        self.pooled = PooledMemory(channels, config.neighbors, images)
        components = min(config.components, grid_channels)
        self.inpainting = FeatureInpainting(grid_channels, config.grid, components, config.items, config.topk)
        self.synthetic: SyntheticClassifier | None = None
        if config.synthetic:
            self.synthetic = SyntheticClassifier(channels)
            self.weights["synthetic"] = config.synthetic_weight

    def fit(self, sample: FeatureSample, config: FeatureConfig) -> dict[str, Tensor]:
        """Fit every part and return the images' signals, `[n]` each, each image judged without itself."""
        assert sample.jittered is not None
        weight = location_weight(config.weight, (config.grid, config.grid)).flatten()
        scores = {
            "pooled_memory": self.pooled.fit(sample.clean, sample.jittered),
            "inpainting": self.inpainting.fit(sample.grid, sample.count, config.penalty, weight, config.seed),
        }
        if self.synthetic is not None and sample.painted is not None:
            scores["synthetic"] = self.synthetic.fit(sample.clean, sample.jittered, sample.painted)
        return self.combined(scores)

    def add(self, sample: FeatureSample, chosen: Tensor) -> dict[str, Tensor]:
        """Add images to the pooled memory, take them as the unit of every signal, and return their signals `[n]`.

        Each image is judged without its own rows.
        """
        assert sample.jittered is not None
        clean, jittered = ([x[chosen] for x in layers] for layers in (sample.clean, sample.jittered))
        raw = torch.cat([self.inpainting(part.float())[0] for part in sample.grid[chosen].split(64)])
        scores = {
            "pooled_memory": self.pooled.add(clean, jittered),
            "inpainting": self.inpainting.measure_normal(raw),
        }
        if self.synthetic is not None:
            scores["synthetic"] = self.synthetic.measure_normal(self.synthetic(clean))
        return self.combined(scores)

    def forward(self, pooled: Sequence[Tensor], grid: Tensor, owner: Tensor | None = None) -> dict[str, Tensor]:
        """Return every signal, `[B]` float64 each, and `inpainting_map` `[B, grid, grid]`.

        Args:
            pooled: pooled features, `[B, C]` of each layer.
            grid: the in-painting's features, `[B, L, sum of C]`.
            owner: `[B]`, the number of each image in the pooled memory, -1 where it is not there: its own rows are left
                out.
        """
        # An exported program has no loop over a batch of any size.
        if not torch.compiler.is_exporting() and len(grid) > 1 and not grid.is_cuda:
            # One image at a time: a matrix product on a CPU sums a row in an order that depends on the row's index, and
            # an image's score must not depend on the images before it. It takes a tenth of the encoder's time.
            owners = [None] * len(grid) if owner is None else owner.split(1)
            images = [self([x[i : i + 1] for x in pooled], grid[i : i + 1], own) for i, own in enumerate(owners)]
            return {name: torch.cat([values[name] for values in images]) for name in images[0]}
        raw, error_map = self.inpainting(grid)
        scores = {"pooled_memory": self.pooled(pooled, owner), "inpainting": self.inpainting.standardized(raw)}
        if self.synthetic is not None:
            scores["synthetic"] = self.synthetic.standardized(self.synthetic(pooled))
        return {**self.combined(scores), "inpainting_map": error_map}

    def combined(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the signals in float64, and their weighted sum."""
        scores = {name: values.double() for name, values in scores.items()}
        weighted = torch.stack([self.weights[name] * values for name, values in scores.items()])
        return {**scores, "combined": weighted.sum(0)}

    def units(self) -> dict[str, list[float]]:
        """Return the means and deviations that `add` changes, by name."""
        own = self.state_dict()
        return {name: own[name].tolist() for name in self._unit_names()}

    def set_units(self, units: object) -> None:
        """Take means and deviations from `units()`.

        Raises:
            InputError: values that are not of these parts.
        """
        own = self.state_dict()
        if not isinstance(units, dict) or units.keys() != self._unit_names():
            raise InputError(f"units must be those of {', '.join(sorted(self._unit_names()))}")
        for name, values in units.items():
            if not isinstance(values, list) or not all(isinstance(value, float) for value in values):
                raise InputError(f"units: {name} must be a list of numbers")
            new = torch.tensor(values)
            if new.shape != own[name].shape or not new.isfinite().all():
                raise InputError(f"units: {name} must be {len(own[name])} finite numbers")
            own[name].copy_(new)

    def _unit_names(self) -> set[str]:
        names = {"pooled.normal_mean", "pooled.normal_std", "inpainting.normal"}
        return names if self.synthetic is None else names | {"synthetic.normal"}

"""Frozen copies of networks for inference: no teacher, BatchNorm folded, channels-last, captured as CUDA graphs."""

import copy
import threading
import warnings
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights

from simsid import cuda_graph
from simsid.arguments import require_instance
from simsid.config import Config
from simsid.data import Preprocessing
from simsid.errors import ConfigError, InputError
from simsid.kernels.ranges import stage
from simsid.models import patches
from simsid.models.calibration import LocationUnits
from simsid.models.discriminator import Discriminator
from simsid.models.generator import CustomEncoder, Encoder, Generator
from simsid.models.scorer import BATCH, Scorer
from simsid.models.signals import CELLS, SIGNALS, available_signals, decoder_memory_map
from simsid.precision import check_precision


class ConfiguredNetwork(nn.Module, Scorer):
    """What `Model` and its frozen copies have in common: networks, and what their configuration says of them."""

    config: Config
    encoder: Encoder | CustomEncoder
    student: Generator
    discriminator: Discriminator

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def preprocessing(self) -> Preprocessing:
        """How files become the images this model takes."""
        return Preprocessing(self.config.image_size, self.config.aspect, self.config.intensity)

    @property
    def signal(self) -> str:
        """The name of the signal that `score` and thresholds use by default."""
        return self.config.signal

    @property
    def signal_names(self) -> tuple[str, ...]:
        """The signals of this model; without an in-painting block there is no memory distance.

        A calibration without the statistics at each location, of an older version or of few images, leaves out the
        signals that are standardized by them.
        """
        names = network_signals(self.config)
        if self.calibration is None:
            return names
        known = self.calibration.locations
        return tuple(name for name in names if SIGNALS[name].locations is None or name in known)

    @property
    def map_names(self) -> tuple[str, ...]:
        """The signals that have a map, and the maps of the decoder's memories."""
        levels = range(1, self.config.decoder_memories + 1)
        return (*super().map_names, *(decoder_memory_map(level) for level in levels))

    def check_locations(self, units: LocationUnits) -> None:
        """Raise `InputError` for means and deviations of signals or locations that the model does not have."""
        counts = {"standardized_residual": CELLS**2}
        if self.config.inpainting != "none":
            counts["standardized_memory_distance"] = self.config.locations
        super().check_locations({name: pair for name, pair in units.items() if name not in counts})
        for name, (mean, _) in units.items():
            if len(mean) != counts[name]:
                raise InputError(f"calibration: locations of {name} must be {counts[name]}, got {len(mean)}")

    @property
    def _input_dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def network_signals(config: Config) -> tuple[str, ...]:
    """Return the signals that a network of this configuration has."""
    memory = ("query", "retrieved") if config.inpainting != "none" else ()
    return available_signals(("reconstruction", "discriminator", *memory))


def check_signal(config: Config) -> None:
    """Raise `ConfigError` where the configured signal is not one that a network of this configuration has."""
    names = network_signals(config)
    if config.signal not in names:
        raise ConfigError(f"signal must be one of {', '.join(names)}, got {config.signal!r}")


class FrozenModel(ConfiguredNetwork):
    """An inference copy of a `Model`: encoder, student and discriminator with frozen weights of their own.

    The BatchNorm after a convolution is folded into it (`torch.nn.utils.fusion`), and the convolutions are
    channels-last. The discriminator keeps its BatchNorms: it normalizes with either kind of statistics, and is a
    two-hundredth of the arithmetic. Changes of the model after the copy was made have no effect on it.

    Args:
        model: a `Model`; it is not changed.
        capture: on CUDA, capture each batch size once as a CUDA graph and replay it.
        share: use the model's own tensors where nothing is folded, so that a copy for one call costs little.
        precision: `"float32"` or `"bfloat16"`; None is the model's `scoring_precision`. In bfloat16, convolutions and
            linear layers multiply bfloat16 numbers and sum in float32. Similarities, attention, normalizations, the
            queries of the in-painting memory, the last convolution, the discriminator and the signals stay in float32.
    """

    def __init__(
        self,
        model: ConfiguredNetwork,
        *,
        capture: bool = True,
        share: bool = False,
        precision: str | None = None,
    ) -> None:
        super().__init__()
        # Wider weights, as of a reference in float64, stay as they are.
        wide = model._input_dtype is not torch.float32
        self.precision = "float32" if wide else check_precision(precision or model.scoring_precision)
        self.config, self.calibration = model.config, model.calibration
        self.encoder = copy.deepcopy(model.encoder, _kept(model.encoder, share))
        self.student = copy.deepcopy(model.student, _kept(model.student, share))
        self.discriminator = copy.deepcopy(model.discriminator, _kept(model.discriminator, share))
        self.eval()
        for part in (self.encoder, self.student):
            for module in list(part.modules()):
                for name, child in module.named_children():
                    if isinstance(child, nn.Sequential) and _is_normalized_convolution(child):
                        setattr(module, name, _folded(*child))
        if self.scoring_precision == "bfloat16":
            self._narrow()
        if not share:
            self.requires_grad_(False)
        self._graphs: dict[tuple[int, ...], cuda_graph.CapturedGraph] = {}
        self.set_location_units(self.calibration.locations if self.calibration else {})
        self._capture = capture and self.device.type == "cuda"
        # Only where graphs are captured, since a lock can neither be copied nor pickled.
        self._lock = threading.Lock() if self._capture else nullcontext()

    def forward(self, images: Tensor) -> dict[str, Any]:
        """Return the outputs of `[B, 1, H, W]` by name, which `simsid.models.signals` reads."""
        images = images.contiguous(memory_format=torch.channels_last)
        encoded = self.encoder(patches.split(images, self.config.patches))
        with stage("student"):
            student = self.student(encoded.deepest, encoded.skips)
        outputs = {
            "images": images,
            "reconstruction": student.images,
            "discriminator": self.discriminator,
            "location_units": {name: self.get_buffer(f"{name}_units") for name in self._standardized},
        }
        if student.query is not None:
            outputs |= {"query": student.query, "retrieved": student.retrieved}
        for i, memory in enumerate(self.student.memories):
            outputs[decoder_memory_map(i + 1)] = (memory, student.decoder_queries[i], student.features[i])
        return outputs

    def outputs(self, images: Tensor) -> dict[str, Any]:
        """Compute what the signals need of one batch `[B, 1, H, W]` on the model's device."""
        # Scores are compared with those of other calls, so no caller's autocast may change the precision.
        narrow = self.scoring_precision == "bfloat16"
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=narrow):
            return self(images)

    def set_location_units(self, units: LocationUnits) -> None:
        """Standardize locations by these means and deviations, those of a calibration."""
        self.check_locations(units)
        for name, pair in units.items():
            values = torch.tensor(pair, dtype=torch.float64, device=self.device)
            self.register_buffer(f"{name}_units", values, persistent=False)
        self._standardized = tuple(units)
        self._graphs = {}  # which have the former units

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """Return the reconstructions, `[B, H, W]`."""
        # One image is not padded to sixteen: a picture shows no last digits.
        return {"reconstruction": self._reconstructed(images, min(BATCH, max(1, len(images))))[:, 0]}

    def reconstruct(self, images: Tensor) -> Tensor:
        """Return the student's reconstruction of `[B, 1, H, W]`, on the images' device."""
        return self._reconstructed(images, BATCH)

    @torch.no_grad()
    def _reconstructed(self, images: Tensor, size: int) -> Tensor:
        found = [
            self.outputs(batch)["reconstruction"][:count].to(images.device, copy=True)
            for batch, count in self._padded_batches(images, size)
        ]
        return torch.cat(found)

    def batch_signals(self, images: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return signals of one batch on the model's device: name to `[B]`, float64, on that device."""
        if not self._capture:
            return self._computed_signals(images, names)
        # Threads share the tensors that a graph writes into, so each copies its result under the lock.
        with self._lock:
            found = self._replayed_signals(images)
            return {name: found[name].clone() for name in names}

    def freeze(self, precision: str | None = None) -> "FrozenModel":
        """Return the copy itself; raise `InputError` for another precision than its own."""
        check_precision(precision or self.precision, (self.precision,))
        return self

    def _narrow(self) -> None:
        """Keep weights of convolutions and linear layers in bfloat16, except where an output needs float32."""
        student: Any = self.student
        wide = [student.output]
        student.output = _Wide(student.output)
        if student.inpainting is not None:
            wide.append(student.inpainting.entry)
            student.inpainting.entry = _Wide(student.inpainting.entry)
        for part in (self.encoder, self.student):
            for module in part.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)) and module not in wide:
                    # New parameters: with `share`, the old ones are the model's own.
                    module._parameters = {
                        name: None if value is None else nn.Parameter(value.to(torch.bfloat16), requires_grad=False)
                        for name, value in module._parameters.items()
                    }

    def _computed_signals(self, images: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        outputs = self.outputs(images)
        with stage("signals"), torch.autocast(images.device.type, enabled=False):
            return {name: SIGNALS[name].compute(outputs).to(torch.float64) for name in names}

    def _replayed_signals(self, images: Tensor) -> dict[str, Tensor]:
        """Replay the graph of this batch size; one graph serves all signals. Captured at its first use."""
        graph = self._graphs.get(images.shape)
        if graph is None:
            try:
                graph = cuda_graph.capture(lambda inputs: self._computed_signals(inputs, self.signal_names), [images])
            except RuntimeError as error:
                warnings.warn(f"inference cannot be captured as a CUDA graph and runs eagerly: {error}", stacklevel=2)
                self._capture = False
                return self._computed_signals(images, self.signal_names)
            self._graphs[images.shape] = graph
        return cast("dict[str, Tensor]", graph(images))


def freeze(model: ConfiguredNetwork, *, capture: bool = True, precision: str | None = None) -> FrozenModel:
    """Return an inference copy of a network; see `FrozenModel`."""
    require_instance("model", model, ConfiguredNetwork)
    if isinstance(model, FrozenModel):
        return model.freeze(precision)
    return FrozenModel(model, capture=capture, precision=precision)


class _Wide(nn.Module):
    """Computes a module in float32 inside autocast."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Apply the module to `x` in float32."""
        with torch.autocast(x.device.type, enabled=False):
            return self.module(x.float())


def _kept(part: nn.Module, share: bool) -> dict[int, Any]:
    """Return what `copy.deepcopy` must not copy, by identity: the objects that hooks hold, and shared tensors."""
    kept: dict[int, Any] = {}
    for module in part.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            kept[id(hooks)] = hooks.copy()
    if share:
        kept |= {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())}
    return kept


def _is_normalized_convolution(module: nn.Sequential) -> bool:
    """Whether a sequence is a plain convolution and a BatchNorm after it."""
    kinds = [type(child) for child in module]
    return len(kinds) == 2 and kinds[0] is nn.Conv2d and issubclass(kinds[1], nn.modules.batchnorm._BatchNorm)


@torch.no_grad()
def _folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return a channels-last convolution that does what the two do in inference mode."""
    folded = copy.copy(convolution)
    assert norm.running_mean is not None and norm.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    folded._parameters = {
        "weight": nn.Parameter(_channels_last(weight), requires_grad=False),
        "bias": nn.Parameter(bias, requires_grad=False),
    }
    return folded


def _channels_last(weight: Tensor) -> Tensor:
    """Lay `[out, in, h, w]` out channels-last, also where there is one input channel.

    One channel has the same strides in both layouts, and PyTorch takes it for the contiguous one: the first feature map
    would be computed in that, in twice the time on a CPU, and then be converted.
    """
    _, channels, height, width = weight.shape
    laid = weight.contiguous(memory_format=torch.channels_last)
    return laid.as_strided(weight.shape, (height * width * channels, 1, width * channels, channels))

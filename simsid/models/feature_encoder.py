"""The frozen encoder of the feature memory: EfficientNet-Lite0 with its weights, or any module that yields maps."""

import functools
import hashlib
import pathlib
from collections.abc import Mapping, Sequence

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from simsid.errors import CheckpointError, InputError, InputTypeError, SimsidError

WEIGHTS = pathlib.Path(__file__).with_name("weights") / "efficientnet_lite0.safetensors"
# Of the file WEIGHTS. A memory is of use with the features it was fitted to only.
SHA256 = "94675e90d4d7fd6b1bef5ef59959fd2496d286a3f9f8ab5ec569c0205320a1a9"
TAPS = (7, 10, 14)
"""Blocks whose outputs are kept: 80 channels at 1/16 of the image's size, 112 at 1/16 and 192 at 1/32."""

# repeats, kernel, stride, expansion, output channels of each stage; the last stage of the published network (320
# channels) and its classifier are not used.
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192))
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INPUTS = ("imagenet", "gray")


class ConvNorm(nn.Module):
    """Convolution, BatchNorm and optionally ReLU6, padded as TensorFlow's "SAME": odd pixels right and below."""

    def __init__(
        self, channels: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        # With stride 1 both sides are padded alike, which the convolution does itself.
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(channels, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs, eps=1e-3)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, h, w]` to `[B, outputs, ceil(h / stride), ceil(w / stride)]`."""
        stride, kernel = self.conv.stride[0], self.conv.kernel_size[0]
        if stride > 1:
            margins = []
            for side in (x.shape[3], x.shape[2]):
                total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
                margins += [total // 2, total - total // 2]
            x = F.pad(x, margins)
        x = self.norm(self.conv(x))
        return F.relu6(x, inplace=True) if self.relu else x

    def fold(self) -> None:
        """Put the BatchNorm into the convolution's weights."""
        assert isinstance(self.norm, nn.BatchNorm2d)
        self.conv = fuse_conv_bn_eval(self.conv, self.norm)
        self.norm = nn.Identity()


class InvertedBottleneck(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection; the input is added where the shapes agree.

    Source: MobileNetV2 (arXiv 1801.04381), section 3.3; EfficientNet-Lite has no squeeze-and-excitation.
    """

    def __init__(self, channels: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = ConvNorm(channels, wide, 1) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(wide, wide, kernel, stride=stride, groups=wide)
        self.project = ConvNorm(wide, outputs, 1, relu=False)
        self.residual = stride == 1 and channels == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, h, w]` to `[B, outputs, ceil(h / stride), ceil(w / stride)]`."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Stem and blocks 0 to 14 of EfficientNet-Lite0, 2.35 million parameters.

    Source: EfficientNet (arXiv 1905.11946); the Lite variant replaces swish by ReLU6 and drops squeeze-and-excitation.

    Args:
        taps: blocks whose outputs `forward` returns.
    """

    def __init__(self, taps: Sequence[int] = TAPS) -> None:
        super().__init__()
        self.taps = tuple(taps)
        self.stem = ConvNorm(3, 32, 3, stride=2)
        channels, blocks = 32, []
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for i in range(repeats):
                blocks.append(InvertedBottleneck(channels, outputs, kernel, stride if i == 0 else 1, expansion))
                channels = outputs
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map `[B, 3, H, W]`, normalized by ImageNet's mean and deviation, to the maps of `taps`, `[B, C, h, w]`."""
        x = self.stem(x)
        maps = []
        for i, block in enumerate(self.blocks[: max(self.taps) + 1]):
            x = block(x)
            if i in self.taps:
                maps.append(x)
        return maps

    def fold(self) -> "EfficientNetLite0":
        """Fold every BatchNorm and return the network, which can then no longer be trained."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold()
        return self


def load_efficientnet_lite0() -> EfficientNetLite0:
    """Return the network with the ImageNet weights that ship with simsid: frozen, folded, channels-last.

    Raises:
        CheckpointError: the file is missing or is not the published one.
    """
    network = EfficientNetLite0().eval().requires_grad_(False)
    network.load_state_dict(_weights())
    return network.fold().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # documented by PyTorch


@functools.cache
def _weights() -> dict[str, Tensor]:
    try:
        content = WEIGHTS.read_bytes()
    except OSError as error:
        raise CheckpointError(f"the encoder's weights {WEIGHTS} cannot be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise CheckpointError(f"{WEIGHTS} is damaged: its SHA-256 is not {SHA256}; install simsid again")
    return {name: tensor.float() for name, tensor in load_safetensors(content).items()}


class FeatureEncoder(nn.Module):
    """Turns images into feature maps that have root mean square 1 over the channels at every location.

        f[b,:,i,j] = x[b,:,i,j] / (sqrt(mean_c x[b,c,i,j]^2) + 1e-8)

    The division makes features comparable between images of different contrast and sharpness.

    Args:
        network: a module that returns a map `[B, C, h, w]`, or a list, tuple or dictionary of maps; None is
            EfficientNet-Lite0. It is frozen and put into inference mode.
        layers: names of submodules (as `network.named_modules()` has them) whose outputs are the maps instead.
        inputs: `"imagenet"` feeds three equal channels normalized by ImageNet's mean and deviation; `"gray"` feeds one
            channel in -1..1.

    Raises:
        InputTypeError: `network` is not a module.
        InputError: a layer that `network` does not have.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module | None, layers: Sequence[str] = (), inputs: str = "imagenet") -> None:
        super().__init__()
        if network is not None and not isinstance(network, nn.Module):
            raise InputTypeError(f"encoder must be a torch.nn.Module, got {type(network).__name__}")
        self.is_foreign = network is not None
        self.network = (load_efficientnet_lite0() if network is None else network).eval().requires_grad_(False)
        self.layers, self.inputs = tuple(layers), inputs
        modules = dict(self.network.named_modules())
        for name in self.layers:
            if not name or name not in modules:
                last = ", ".join([name for name in modules if name][-5:])
                known = f"its last ones are {last}" if last else "it has none, so leave layers out"
                raise InputError(f"layers must name submodules of the encoder, got {name!r}; {known}")
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def train(self, mode: bool = True) -> "FeatureEncoder":  # noqa: ARG002
        """Stay in inference mode: the statistics of BatchNorm belong to the weights."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, precision: str = "float32") -> list[Tensor]:
        """Map `[B, 1, H, W]` in -1..1 to one float32 map `[B, C, h, w]` for each layer.

        Args:
            images: see above.
            precision: `"float32"`, or `"bfloat16"` for the network's convolutions and products; the maps are
                normalized in float32.

        Raises:
            InputTypeError: the network returns something other than maps.
            InputError: the network cannot take the images.
        """
        x = images
        if self.inputs == "imagenet":
            x = ((images + 1) / 2 - self.mean) / self.std
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            maps = self._foreign_maps(x) if self.is_foreign else self._layer_outputs(x)
        for value in maps:
            is_map = isinstance(value, Tensor) and value.dim() == 4 and 0 not in value.shape[1:]
            if not is_map or value.shape[0] != images.shape[0]:
                what = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise InputTypeError(
                    f"encoder must yield feature maps [{len(images)}, C, h, w] of images {list(x.shape)}, got {what}"
                )
        if not maps:
            raise InputTypeError("encoder must yield at least one feature map, got none")
        return [_normalized(value.float()) for value in maps]

    def fingerprint(self) -> dict[str, object]:
        """Return what identifies the features, for a saved model: the network's class and a hash of its weights."""
        if not self.is_foreign:
            return {"foreign": False, "network": "efficientnet_lite0", "sha256": SHA256}
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        kind = type(self.network)
        return {"foreign": True, "network": f"{kind.__module__}.{kind.__qualname__}", "sha256": digest.hexdigest()}

    def _foreign_maps(self, x: Tensor) -> list[Tensor]:
        """Return the maps of the caller's module; an error raised inside it is shown with the input that it was fed."""
        try:
            return self._layer_outputs(x)
        except (SimsidError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            other = (
                'inputs="gray" feeds 1 channel' if self.inputs == "imagenet" else 'inputs="imagenet" feeds 3 channels'
            )
            raise InputError(
                f"encoder must take images {list(x.shape)} and yield feature maps [{len(x)}, C, h, w], and raised "
                f"{type(error).__name__}: {' '.join(str(error).split())} ({other})"
            ) from error

    def _layer_outputs(self, x: Tensor) -> list[Tensor]:
        if not self.layers:
            return _as_list(self.network(x))
        outputs: dict[str, Tensor] = {}

        def keep(name: str, output: Tensor) -> None:
            outputs[name] = output

        modules = dict(self.network.named_modules())
        hooks = [
            modules[name].register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
            for name in self.layers
        ]
        try:
            self.network(x)
        finally:
            for hook in hooks:
                hook.remove()
        missing = [name for name in self.layers if name not in outputs]
        if missing:
            raise InputError(f"the encoder does not run its layer {missing[0]!r}")
        return [outputs[name] for name in self.layers]


def _as_list(value: object) -> list[Tensor]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else [value]  # type: ignore[list-item]


def _normalized(x: Tensor) -> Tensor:
    return (x / (x.square().mean(1, keepdim=True).sqrt() + 1e-8)).contiguous()

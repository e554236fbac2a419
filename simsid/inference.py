"""What a model becomes for scoring: BatchNorm folded into the convolutions, no teacher, one CUDA graph a batch size."""

import copy
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_weights

from simsid import graphs, patches, signals
from simsid.kernels.ranges import stage


class InferenceForm:
    """Encoder, student and discriminator of a model, arranged for inference; weights stay the model's own.

    The convolutions that a BatchNorm follows are copies with its scale and shift folded in, laid out channels-last;
    everything else is shared. The discriminator's BatchNorms stay: it scores with either kind of statistics, and is a
    two-hundredth of the work. On CUDA each batch size is recorded once as a CUDA graph and replayed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sources = [*model.parameters(), *model.buffers()]
        shared = {id(tensor): tensor for tensor in self._sources}
        self.patches = model.config.patches
        self.encoder, self.student, self.discriminator = copy.deepcopy(
            (model.encoder, model.student, model.discriminator), shared
        )
        self._folded: list[tuple[nn.Conv2d, nn.Conv2d, _BatchNorm]] = []
        for part in (self.encoder, self.student, self.discriminator):
            part.eval()
        for part in (self.encoder, self.student):
            for module in list(part.modules()):
                for name, child in module.named_children():
                    if isinstance(child, nn.Sequential) and isinstance(child[-1], _BatchNorm):
                        setattr(module, name, self._fold(*child))
        self._signature = self._measure()
        self._replays: dict[tuple[int, ...], graphs.Replay] = {}
        self._record = self._sources[0].is_cuda

    @torch.no_grad()
    def update(self, weights_moved: bool) -> bool:
        """Follow the model's weights; False where they lie elsewhere now and a new form is needed.

        `weights_moved` says that they may have changed in ways that tensors do not count, as replayed graphs do.
        """
        found = self._measure()
        if [place for place, _ in found] != [place for place, _ in self._signature]:
            return False
        if weights_moved or found != self._signature:
            for folded, convolution, norm in self._folded:
                for kept, value in zip((folded.weight, folded.bias), _folded_weights(convolution, norm)):
                    kept.copy_(value)
            self._signature = found
        return True

    def reconstruct(self, images: Tensor) -> Tensor:
        """Return the reconstructions of `[B, 1, H, W]`, which the next call may overwrite."""
        return self._run(images, ())["student"]

    def signals(self, images: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """Return raw signals of `[B, 1, H, W]`, `[B]` each, which the next call may overwrite."""
        return self._run(images, tuple(names))

    def _run(self, images: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        images = images.contiguous(memory_format=torch.channels_last)
        if not self._record:
            return self._compute(images, names)
        replay = self._replays.get(images.shape)
        if replay is None:
            try:
                # Everything at once: one graph serves all signals and the reconstruction.
                replay = graphs.record(lambda inputs: self._compute(inputs, self._available), [images])
            except RuntimeError as error:
                warnings.warn(
                    f"inference could not be recorded as a CUDA graph and runs eagerly: {error}", stacklevel=2
                )
                self._record = False
                return self._compute(images, names)
            self._replays[images.shape] = replay
        return replay(images)

    @property
    def _available(self) -> tuple[str, ...]:
        without = () if self.student.inpainting is not None else ("memory_distance",)
        return tuple(name for name in signals.SIGNALS if name not in without)

    def _compute(self, images: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        encoded = self.encoder(patches.split(images, self.patches))
        with stage("student"):
            found = self.student(encoded.deepest, encoded.skips)
        student, discriminator = found.images, self.discriminator
        compute: dict[str, Callable[[], Tensor]] = {
            "discriminator_per_image": lambda: -discriminator(student, "per_image"),
            "discriminator_running": lambda: -discriminator(student),
            "residual": lambda: signals.residual(images, student),
            "local_residual": lambda: signals.local_residual(images, student),
            "focal_residual": lambda: signals.focal_residual(images, student),
            "memory_distance": lambda: signals.memory_distance(found.query, found.retrieved),
        }
        with stage("signals"):
            return {"student": student} | {name: compute[name]() for name in names}

    @torch.no_grad()
    def _fold(self, convolution: nn.Conv2d, norm: _BatchNorm) -> nn.Conv2d:
        folded = copy.copy(convolution)
        folded._parameters = dict(convolution._parameters)
        weight, bias = _folded_weights(convolution, norm)
        folded.weight = nn.Parameter(_channels_last(weight), requires_grad=False)
        folded.bias = nn.Parameter(bias, requires_grad=False)
        self._folded.append((folded, convolution, norm))
        return folded

    def _measure(self) -> list[tuple[int, int]]:
        """Return where each weight lies and how often it was changed."""
        return [(tensor.data_ptr(), tensor._version) for tensor in self._sources]


def _folded_weights(convolution: nn.Conv2d, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    statistics = norm.running_mean, norm.running_var, norm.eps
    return fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics, norm.weight, norm.bias)


def _channels_last(weight: Tensor) -> Tensor:
    """Lay `[out, in, h, w]` out channels-last, one input channel too.

    One channel lies the same either way, and PyTorch takes it for the usual layout: the first map would come in that,
    in twice the time on a CPU, and then be converted.
    """
    _, channels, height, width = weight.shape
    laid = weight.contiguous(memory_format=torch.channels_last)
    return laid.as_strided(weight.shape, (height * width * channels, 1, width * channels, channels))

"""What a model becomes for scoring: BatchNorm folded into the convolutions, no teacher, one CUDA graph a batch size."""

import threading
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_weights

from simsid import cuda_graph
from simsid.kernels.ranges import stage
from simsid.models import patches, signals


class InferenceForm:
    """Encoder, student and discriminator of a model, arranged for inference; weights stay the model's own.

    The convolutions that a BatchNorm follows are copies with its scale and shift folded in, laid out channels-last;
    everything else is shared. The discriminator's BatchNorms stay: it scores with either kind of statistics, and is a
    two-hundredth of the work. On CUDA each batch size is recorded once as a CUDA graph and replayed, and hooks of the
    modules run only as it is recorded. What a module was told through its attributes is what held when this was made.

    `lock` is held from a call until its result has been copied: threads share what a graph writes into.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules, self._tensors = _contents(model)
        # Held, so that no other weights can come to lie where these were.
        self._storages = [tensor.untyped_storage() for tensor in self._tensors]
        self._places = [tensor.data_ptr() for tensor in self._tensors]
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._counted]
        self.patches, self._names = model.config.patches, model.signal_names
        self.encoder, self.student, self.discriminator = map(_twin, (model.encoder, model.student, model.discriminator))
        self._folded: list[tuple[nn.Conv2d, nn.Conv2d, _BatchNorm]] = []
        for part in (self.encoder, self.student):
            for module in list(part.modules()):
                for name, child in module.named_children():
                    if _is_normalised(child):
                        setattr(module, name, self._fold(*child))
        self._replays: dict[tuple[int, ...], cuda_graph.CapturedGraph] = {}
        self._record = model.device.type == "cuda"
        self.lock = threading.Lock() if self._record else nullcontext()

    @torch.no_grad()
    def update(self, model: nn.Module, weights_moved: bool) -> bool:
        """Follow the model's weights; False where it has others now, or has them elsewhere, and needs a new form.

        `weights_moved` says that they may have changed in ways that tensors do not count, as replayed graphs do.
        """
        modules, tensors = _contents(model)
        if modules != self._modules or list(map(id, tensors)) != list(map(id, self._tensors)):
            return False
        if [tensor.data_ptr() for tensor in tensors] != self._places:
            return False
        versions = [tensor._version for tensor in self._counted]
        # Tensors made in PyTorch's inference mode count nothing.
        if weights_moved or versions != self._versions or len(self._counted) < len(tensors):
            for folded, convolution, norm in self._folded:
                for kept, value in zip((folded.weight, folded.bias), _folded_weights(convolution, norm)):
                    kept.copy_(value)
            self._versions = versions
        return True

    def reconstruct(self, images: Tensor) -> Tensor:
        """Return the reconstructions of `[B, 1, H, W]`, which the next call may overwrite."""
        return self._run(images, ())["student"]

    def signals(self, images: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """Return raw signals of `[B, 1, H, W]`, `[B]` each, which the next call may overwrite."""
        return self._run(images, tuple(names))

    def _run(self, images: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        images = images.contiguous(memory_format=torch.channels_last)
        # A graph keeps the precision it was recorded in, and scores are compared with those of other calls.
        with torch.autocast(images.device.type, enabled=False):
            return self._replayed(images, names) if self._record else self._compute(images, names)

    def _replayed(self, images: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        replay = self._replays.get(images.shape)
        if replay is None:
            try:
                # Everything at once: one graph serves all signals and the reconstruction.
                replay = cuda_graph.capture(lambda inputs: self._compute(inputs, self._names), [images])
            except RuntimeError as error:
                warnings.warn(
                    f"inference could not be recorded as a CUDA graph and runs eagerly: {error}", stacklevel=2
                )
                self._record = False
                return self._compute(images, names)
            self._replays[images.shape] = replay
        return replay(images)

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
        folded = _twin(convolution)
        weight, bias = _folded_weights(convolution, norm)
        folded.weight = nn.Parameter(_channels_last(weight), requires_grad=False)
        folded.bias = nn.Parameter(bias, requires_grad=False)
        self._folded.append((folded, convolution, norm))
        return folded


def _contents(model: nn.Module) -> tuple[list[nn.Module], list[Tensor]]:
    """Return all modules and tensors; a third of the time of `parameters` and `buffers`, which look for repetitions."""
    modules = list(model.modules())
    tensors = [value for module in modules for kept in (module._parameters, module._buffers) for value in kept.values()]
    return modules, [tensor for tensor in tensors if tensor is not None]


def _is_normalised(module: nn.Module) -> bool:
    """Whether a module is a plain convolution with a BatchNorm after it, and nothing else."""
    kinds = [type(child) for child in module] if type(module) is nn.Sequential else []
    return len(kinds) == 2 and kinds[0] is nn.Conv2d and issubclass(kinds[1], _BatchNorm)


def _twin(module: nn.Module) -> nn.Module:
    """Copy a module and those in it, in inference mode, with the same tensors and hooks."""
    made = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    # What `module.compile()` left calls the original.
    made.__dict__ |= {"training": False, "_compiled_call_impl": None}
    made._parameters, made._buffers = dict(module._parameters), dict(module._buffers)
    made._modules = {name: None if child is None else _twin(child) for name, child in module._modules.items()}
    return made


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

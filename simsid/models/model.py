"""The networks of SimSID and SQUID with their calibration: what is trained, saved and scored with."""

import copy
import json
import os
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from simsid import checkpoint
from simsid.config import Config, TrainingConfig
from simsid.distributed import ProcessGroup
from simsid.errors import CheckpointError, ConfigError, InputError, InputTypeError
from simsid.kernels.ranges import stage
from simsid.models import patches
from simsid.models.base import AnomalyModel
from simsid.models.calibration import Calibration
from simsid.models.discriminator import Discriminator
from simsid.models.generator import CustomEncoder, Encoder, Generator
from simsid.models.inference import ConfiguredNetwork, FrozenModel, check_signal
from simsid.models.losses import distillation_loss
from simsid.models.memory import SpaceAwareMemory
from simsid.models.memory_contents import MemoryContents
from simsid.models.network_memories import network_memories

if TYPE_CHECKING:
    from simsid.training import Trainer

BACKENDS = ("auto", "triton", "torch")


class Reconstruction(NamedTuple):
    """What `Model.forward` returns in every mode.

    `student` `[B, 1, H, W]` in -1..1; `teacher` likewise and `distillation` (a scalar), or None where the teacher was
    not computed; `query` and `retrieved` `[B, L, D]`: the in-painting block's queries and what its memory returned, or
    None in a model without the block; `divergence` (a scalar, nats a pixel) of a variational autoencoder, else None.
    """

    student: Tensor
    teacher: Tensor | None = None
    distillation: Tensor | None = None
    query: Tensor | None = None
    retrieved: Tensor | None = None
    divergence: Tensor | None = None


class Model(ConfiguredNetwork, AnomalyModel):
    """Encoder, student and teacher generator, and discriminator of SimSID or SQUID, with their calibration.

        A = 1 - sigmoid((D(student(I)) - mu) / sigma)          1 is anomalous

    Source: SimSID (arXiv 2403.08689), figure 2 and section 3; SQUID (arXiv 2111.13495), figure 2 and section 3.

    Args:
        config: a `Config`; None is `Config()`, SimSID as published.
        fused: True or `"auto"`: fused kernels where the tensors are on CUDA and PyTorch elsewhere; False: PyTorch
            everywhere. Short for `backend="auto"` and `backend="torch"`.
        backend: as the ops take it: `"auto"`, `"torch"`, or `"triton"`, with which a forward pass where the kernels
            cannot run is an error that says why. None follows `fused`.
        encoder: a module in the place of the papers' encoder; see `simsid.models.generator.CustomEncoder` for the maps
            that it must yield. It is trained with the rest, where its parameters require gradients. Its weights are
            saved with the model's, its code is not: `simsid.load(folder, encoder=module)` needs a module of that class
            again, and loads the weights into it.
        **overrides: single fields of the configuration, as in `Model(width=8)`.

    Raises:
        ConfigError: a configuration that cannot be built; the message names the field.
        InputError: an encoder that yields maps of other shapes.
        InputTypeError: an encoder that is not a module.
    """

    kind: ClassVar[str] = "simsid"
    precisions: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")

    def __init__(
        self,
        config: Config | None = None,
        *,
        fused: bool | str = "auto",
        backend: str | None = None,
        encoder: nn.Module | None = None,
        **overrides: object,
    ) -> None:
        super().__init__()
        if fused not in (True, False, "auto"):
            raise ConfigError(f"fused must be True, False or 'auto', got {fused!r}")
        if backend is None:
            backend = "auto" if fused else "torch"
        if backend not in BACKENDS:
            raise ConfigError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
        if not isinstance(config, (Config, NoneType)):
            raise ConfigError(f"config must be a Config, got {config!r}")
        self.config = config = (config or Config()).replace(**overrides)
        check_signal(config)
        self.backend = backend
        self.encoder = Encoder(config) if encoder is None else CustomEncoder(config, encoder)
        self.student = Generator(config, student=True, backend=backend)
        self.teacher = Generator(config, student=False) if config.distillation else None
        self.discriminator = Discriminator(config.image_size, config.discriminator_width)
        self.calibration: Calibration | None = None

    @property
    def queue(self) -> SpaceAwareMemory | None:
        """The in-painting block's memory where it is a queue that training must feed, else None."""
        block = self.student.inpainting
        return block.memory if block is not None and block.memory.is_queue else None

    def forward(self, images: Tensor, teacher: bool | None = None) -> Reconstruction:
        """Reconstruct `[B, 1, H, W]` in -1..1; `teacher=None` computes the teacher in training mode only."""
        self._check(images)
        shown = self._blank(images) if self.training and self.config.pixel_inpainting else images
        encoded = self.encoder(patches.split(shown, self.config.patches))
        with stage("student"):
            student = self.student(encoded.deepest, encoded.skips)
        if self.teacher is None or not (self.training if teacher is None else teacher):
            return Reconstruction(student.images, None, None, student.query, student.retrieved, student.divergence)
        deepest, skips = encoded
        if self.config.stop_gradient:
            deepest, skips = deepest.detach(), [skip.detach() for skip in skips]
        with stage("teacher"):
            taught = self.teacher(deepest, skips)
        with stage("distillation"):
            distillation = distillation_loss(student.features, taught.features)
        return Reconstruction(
            student.images, taught.images, distillation, student.query, student.retrieved, student.divergence
        )

    def fit(
        self,
        train: object,
        val: object = None,
        *,
        progress: bool = False,
        group: ProcessGroup | None = None,
        config: TrainingConfig | None = None,
        run: str | os.PathLike | None = None,
    ) -> "Model":
        """Train with `simsid.Trainer` and return the model; see there for the arguments and what is kept."""
        # Through the public name: the training package builds on this module, which must not import it.
        import simsid

        trainer = cast("type[Trainer]", simsid.Trainer)
        trainer(self, config, run=run, progress=progress, group=group).fit(train, val)
        return self

    def to_device(self, device: torch.device | str) -> "Model":
        """Move the weights to a device, in place."""
        return self.to(device)

    def freeze(self, precision: str | None = None) -> FrozenModel:
        """Return an inference copy: no teacher, folded, channels-last, on CUDA captured; for repeated scoring."""
        return FrozenModel(self, precision=precision)

    def outputs(self, images: Tensor) -> dict[str, Any]:
        """Compute what the signals need of one batch `[B, 1, H, W]` on the model's device."""
        return self._inference_copy().outputs(images)

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """Return the reconstructions, `[B, H, W]`."""
        return self._inference_copy().pictures(images)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Return the student's reconstruction of `[B, 1, H, W]` in inference mode, on the images' device."""
        return self._inference_copy().reconstruct(images)

    def memories(self, images: object) -> tuple[MemoryContents, ...]:
        """Return the contents of the in-painting block's memory and of the decoder's, and what `images` use of them."""
        return network_memories(self.freeze("float32"), images)

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Return weights and buffers, and configuration and memory layout."""
        # Libraries sum in another order for another layout; a loaded model scores bit for bit as this one.
        layout = "channels_last" if self._is_channels_last() else "contiguous"
        custom = {"encoder": self.encoder.name} if isinstance(self.encoder, CustomEncoder) else {}
        return checkpoint.tensors(self), {"layout": layout, "config": self.config.to_dict(), **custom}

    def load_options(self) -> dict[str, Any]:
        """Return what `load` needs beside a folder of this model: a copy of its encoder where that is custom."""
        custom = isinstance(self.encoder, CustomEncoder)
        return {"encoder": copy.deepcopy(self.encoder.network)} if custom else {}

    @classmethod
    def from_state(
        cls, tensors: dict[str, Tensor], document: dict[str, Any], source: str, **options: object
    ) -> "Model":
        """Rebuild a model from `state`; `options` are `fused`, `backend` and, with a custom encoder, `encoder`."""
        config, saved, encoder = Config.from_dict(document["config"]), document.get("encoder"), options.get("encoder")
        for name in options:
            if name not in ("fused", "backend", "encoder"):
                raise InputTypeError(f"Model.load takes fused, backend, encoder and device, got {name!r}")
        if saved is not None and encoder is None:
            raise CheckpointError(
                f"{source} was trained with the encoder {saved}, which is not part of simsid: load it with "
                "encoder=module"
            )
        if saved is None and encoder is not None:
            raise CheckpointError(f"{source} was trained with the papers' encoder: load it without encoder=")
        # On the meta device first: sizes from a foreign file are compared before any memory is taken for them.
        with torch.device("meta"):
            copied = copy.deepcopy(encoder).to("meta") if isinstance(encoder, nn.Module) else encoder
            checkpoint.check_shapes(cls(config, encoder=copied), tensors, source)  # type: ignore[arg-type]
        with torch.random.fork_rng(devices=[]):
            model = cls(config, **options)  # type: ignore[arg-type]  # __init__ checks them
        checkpoint.load_state(model, tensors, source)
        if document.get("layout") == "channels_last":
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in PyTorch's stubs
        return model.eval()

    def get_extra_state(self) -> Tensor:
        """Return the calibration, so that it travels in `state_dict`: JSON as uint8, a tensor as every other entry."""
        text = json.dumps(self.calibration.to_dict() if self.calibration else None)
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: object) -> None:
        """Take the calibration from `get_extra_state`."""
        if not isinstance(state, Tensor) or state.dtype != torch.uint8:
            raise InputTypeError(f"the model's extra state must be a uint8 tensor, got {type(state).__name__}")
        try:
            values = json.loads(state.cpu().numpy().tobytes())
        except ValueError as error:
            raise InputError(f"the model's extra state must be JSON: {error}") from None
        self.calibration = Calibration.from_dict(values) if values else None

    def _inference_copy(self) -> FrozenModel:
        return FrozenModel(self, capture=False, share=True)

    def _blank(self, images: Tensor) -> Tensor:
        """Zero the configured share of each image's patches."""
        P, L = self.config.patches, self.config.locations
        order = torch.rand(images.shape[0], L, device=images.device).argsort(1)
        blank = (order < round(self.config.pixel_inpainting * L)).view(-1, 1, P, P)
        S = self.config.patch_size
        return images.masked_fill(blank.repeat_interleave(S, 2).repeat_interleave(S, 3), 0.0)

    def _is_channels_last(self) -> bool:
        weight = self.discriminator.get_parameter("convolutions.1.weight")
        return weight.is_contiguous(memory_format=torch.channels_last)

    def _check(self, images: Tensor) -> None:
        size = self.config.image_size
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise InputTypeError(f"images must be a floating-point tensor with values in -1..1, got {got}")
        if images.dim() != 4 or images.shape[1:] != (1, size, size) or images.shape[0] == 0:
            raise InputError(f"images must have shape [B, 1, {size}, {size}], B at least 1, got {list(images.shape)}")

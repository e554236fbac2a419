"""Data-parallel training: wrappers that average gradients over the ranks, and BatchNorm over the global batch."""

import inspect
from typing import Any

import torch
import torch.distributed.nn
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from simsid.models.batch_norm import BatchNorm2d
from simsid.models.model import Model, Reconstruction


class DiscriminatorPair(nn.Module):
    """A discriminator's logits of real and of reconstructed images as one forward pass, as DDP counts them."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits, `[B]` each; each batch is normalized with its own statistics."""
        return self.discriminator(real), self.discriminator(fake)


class _ModelWithoutDiscriminator(nn.Module):
    """A model's forward pass without the discriminator, whose weights are trained in other iterations."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.parts = nn.ModuleList(part for part in (model.encoder, model.student, model.teacher) if part is not None)
        # As an attribute, the model would be registered as a submodule, and its discriminator with it.
        self._model = (model,)

    def forward(self, images: Tensor, teacher: bool) -> Reconstruction:
        return self._model[0](images, teacher=teacher)


def data_parallel(model: Model) -> tuple[nn.Module, nn.Module]:
    """Return the model's forward pass and a `DiscriminatorPair`, whose gradients are averaged over the ranks."""
    # Forward passes must not broadcast buffers, which the backward pass still needs. PyTorch 2.13 renamed the option.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {
        "forward_sync_buffers" if renamed else "broadcast_buffers": False,
        "gradient_as_bucket_view": True,
    }
    reconstruct = DistributedDataParallel(_ModelWithoutDiscriminator(model), **options)
    discriminate = DistributedDataParallel(DiscriminatorPair(model.discriminator), **options)
    return reconstruct, discriminate


def synchronize_batch_norms(model: nn.Module, enabled: bool = True) -> None:
    """Let every BatchNorm of `model` use the global batch's statistics, or its own rank's; in place, same tensors."""
    kinds = {BatchNorm2d, nn.SyncBatchNorm, HostSyncBatchNorm}
    kind: type[nn.Module] = BatchNorm2d
    if enabled:
        kind = nn.SyncBatchNorm if next(model.parameters()).is_cuda else HostSyncBatchNorm
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if type(norm) in kinds - {kind}:
                replacement = kind(norm.num_features, norm.eps, norm.momentum)
                replacement._parameters, replacement._buffers = norm._parameters, norm._buffers
                setattr(module, name, replacement.train(norm.training))


class HostSyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the images of all ranks on a CPU, where PyTorch's `SyncBatchNorm` does not run."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `[B, C, H, W]`; in training mode with mean and variance of the global batch."""
        if not self.training or not distributed.is_initialized():
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None  # for type checkers
        assert self.num_batches_tracked is not None and self.momentum is not None
        dtype = x.dtype
        if dtype == torch.bfloat16:
            x = x.float()  # as PyTorch's BatchNorm, whose statistics are float32 under autocast
        count = x.numel() // x.shape[1] * distributed.get_world_size()
        mean = _sum_over_ranks(x.sum((0, 2, 3))) / count
        centered = x - mean[:, None, None]
        variance = _sum_over_ranks(centered.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(dtype)


def _sum_over_ranks(values: Tensor) -> Tensor:
    """Sum over the ranks; the gradient is the sum of theirs."""
    return torch.distributed.nn.all_reduce(values)

"""BatchNorm that is fast on a CPU for maps of few channels, which PyTorch normalizes one number at a time."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

VECTOR = 16
"""Channels from which PyTorch's own kernel for channels-last maps fills a vector register."""

LARGE = 2**17
"""Numbers of a map from which the gain exceeds the cost of the additional small operations."""


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`, but several times faster for large channels-last maps of few channels, in training on a CPU.

    A channels-last map `[B, C, H, W]` is also a table `[B H, W C]`. Its columns are many enough for a vector register,
    so PyTorch's kernel computes their statistics; those of a channel follow from its W columns:

        mean = mean_w(m_w),   var = mean_w(v_w + (m_w - mean)^2)

    With 16 channels or more, small maps, another layout or dtype, in inference, on a GPU and under torch.compile the
    computation is PyTorch's own. The gradient of this one cannot be differentiated again.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `[B, C, H, W]`; in training mode with the batch's statistics."""
        if not self.training or not _is_narrow(x) or self.weight.dtype != torch.float32:
            return super().forward(x)
        assert self.num_batches_tracked is not None and self.momentum is not None
        assert self.running_mean is not None and self.running_var is not None
        y, mean, var = _NarrowBatchNorm.apply(x, self.weight, self.bias, self.eps)
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return y


def _is_narrow(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dim() == 4
        and x.shape[1] < VECTOR
        and x.numel() >= LARGE
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
    )


class _NarrowBatchNorm(torch.autograd.Function):
    """Returns the normalized map, and mean and biased variance of every channel, which have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        width, channels = x.shape[3], x.shape[1]
        rows = _rows(x)
        # The statistics get the dtype of the running ones, here float32; a momentum of 0 leaves these unchanged.
        running = weight.new_zeros(2, width * channels)
        statistics = torch.batch_norm_update_stats(rows, running[0], running[1], 0.0)
        column_mean, column_var = (each.view(width, channels) for each in statistics)
        # Every column has as many numbers as the others, so that their plain mean is the channel's.
        mean = column_mean.mean(0)
        var = (column_var + (column_mean - mean).square()).mean(0)
        scale, shift, center, spread = (each.repeat(width) for each in (weight, bias, mean, var))
        # Not a view of the kernel's own output: the activation after it works in place.
        y = torch.empty_like(x)
        # With given statistics the kernel saves none.
        unused = [weight.new_empty(0), weight.new_empty(0)]
        torch.ops.aten.native_batch_norm.out(
            rows,
            scale,
            shift,
            center,
            spread,
            False,
            0.0,
            eps,
            out=_rows(y),
            save_mean=unused[0],
            save_invstd=unused[1],
        )
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        width, channels = x.shape[3], x.shape[1]
        grad_y = grad_y.contiguous(memory_format=torch.channels_last)
        rows, grad_rows = _rows(x), _rows(grad_y)
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad_rows,
            rows,
            weight.repeat(width),
            None,
            None,
            mean.repeat(width),
            inverse.repeat(width),
            True,
            0.0,  # epsilon is in the inverse deviation
            [False, True, True],
        )
        grad_weight, grad_bias = (each.view(width, channels).sum(0) for each in (grad_weight, grad_bias))
        # dx = w s (dy - mean(dy) - (x - mean) s mean(dy (x - mean) s)), s the inverse deviation, as a line of x and dy.
        count = x.numel() // channels
        factor = weight * inverse
        slope = -factor * inverse * grad_weight / count
        offset = -factor * grad_bias / count - slope * mean
        slope, offset, factor = (each.repeat(width).to(x.dtype) for each in (slope, offset, factor))
        grad_x = torch.addcmul(offset, _table(x), slope).addcmul_(_table(grad_y), factor)
        batch, _, height, _ = x.shape
        return grad_x.view(batch, height, width, channels).permute(0, 3, 1, 2), grad_weight, grad_bias, None


def _table(x: Tensor) -> Tensor:
    """View a channels-last `[B, C, H, W]` as `[B H, W C]`."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[3] * x.shape[1])


def _rows(x: Tensor) -> Tensor:
    """View a channels-last `[B, C, H, W]` as a channels-last map `[B H, W C, 1, 1]`."""
    return _table(x)[:, :, None, None]

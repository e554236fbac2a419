"""Argument checks shared by the ops: one clear sentence before anything is launched."""

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, tensor: Tensor, shape: tuple[str | int, ...], like: Tensor | None = None) -> None:
    """Raise unless `tensor` is floating point, of `shape` (names stand for any size) and on the device of `like`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {_show(shape)}, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be a floating-point tensor (float16 to float64), got {tensor.dtype}")
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, tensor.shape)
    )
    if not fits:
        raise ValueError(f"{name} must have shape {_show(shape)}, got {_show(tuple(tensor.shape))}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the query, got {tensor.device}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _show(shape: tuple[str | int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"

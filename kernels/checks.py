"""Argument checks shared by the ops: one clear sentence before anything is launched."""

import math
import numbers
import operator
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[str | int, ...],
    like: tuple[str, Tensor] | None = None,
    boolean: bool = False,
) -> None:
    """Raise unless `tensor` is a floating-point (or boolean) tensor of the expected shape and device.

    Args:
        name: of the argument, for the message.
        tensor: the argument.
        shape: expected sizes; a string names an axis that may have any size.
        like: name and value of the argument whose device is expected, or None for any device.
        boolean: whether the dtype must be bool instead of a floating-point one.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: another shape or device.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {_show(shape)}, got {type(tensor).__name__}")
    if boolean and tensor.dtype != torch.bool:
        raise TypeError(f"{name} must be a boolean tensor, got {tensor.dtype}")
    if not boolean and tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be a floating-point tensor (float16 to float64), got {tensor.dtype}")
    fits = tensor.shape == shape or (
        tensor.dim() == len(shape)
        and all(isinstance(expected, str) or expected == size for expected, size in zip(shape, tensor.shape))
    )
    if not fits:
        raise ValueError(f"{name} must have shape {_show(shape)}, got {_show(tuple(tensor.shape))}")
    if like is not None and tensor.device != like[1].device:
        raise ValueError(f"{name} must be on {like[1].device} like {like[0]}, got {tensor.device}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_integer(name: str, value: Any, least: int) -> int:
    """Return `value` as a Python int of at least `least`; take whatever is an integer, NumPy's included.

    Raises:
        TypeError: not an integer; bool is refused because `True` is more likely a misplaced flag.
        ValueError: below `least`.
    """
    if type(value) is int and value >= least:
        return value
    message = f"{name} must be an integer of at least {least}, got {value!r}"
    if isinstance(value, bool):
        raise TypeError(message)
    if type(value) is not int:
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(message) from None
    if value < least:
        raise ValueError(message)
    return value


def check_positive(name: str, value: Any) -> None:
    """Raise unless `value` is a positive, finite number; a tensor is refused, since it would get no gradient.

    Raises:
        TypeError: not a real number.
        ValueError: not above 0, infinite or NaN.
    """
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a positive number, got a tensor, to which no gradient would be computed")
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a positive number, got {value!r}")
    if not 0.0 < float(value) < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def _show(shape: tuple[str | int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"

"""Checks of arguments of the Python interface: one sentence with the name, what was expected and what came."""

import operator
import os
from typing import Any

from simsid.errors import InputError, InputTypeError

PathLike = str | os.PathLike


def require_instance(name: str, value: object, *expected: type) -> None:
    """Raise `InputTypeError` unless `value` is an instance of one of `expected`."""
    if not isinstance(value, expected):
        kinds = " or ".join("None" if kind is type(None) else kind.__name__ for kind in expected)
        raise InputTypeError(f"{name} must be of type {kinds}, got {_shown(value)}")


def require_path(name: str, value: object) -> str:
    """Return a path as text; raise `InputTypeError` for anything but text or a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise InputTypeError(f"{name} must be a path, got {_shown(value)}")
    path = os.fspath(value)
    if not isinstance(path, str):
        raise InputTypeError(f"{name} must be a path of text, got bytes")
    if not path:
        raise InputError(f"{name} must be a path, got an empty one")
    return path


def require_whole_number(name: str, value: Any, least: int | None = None) -> int:
    """Return a whole number, which may be numpy's; raise for another type or a number below `least`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise InputTypeError(f"{name} must be a whole number, got {_shown(value)}") from None
    if least is not None and number < least:
        raise InputError(f"{name} must be at least {least}, got {number}")
    return number


def require_number(name: str, value: Any) -> float:
    """Return a number as float; raise `InputTypeError` for another type."""
    if isinstance(value, (bool, str, bytes)):
        raise InputTypeError(f"{name} must be a number, got {_shown(value)}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputTypeError(f"{name} must be a number, got {_shown(value)}") from None


def require_device(value: Any) -> Any:
    """Return a `torch.device`; raise `InputError` for a name that PyTorch does not know or cannot use here."""
    import torch

    try:
        if not isinstance(value, (str, torch.device)):
            raise RuntimeError
        device = torch.device(value)
    except RuntimeError:
        raise InputError(f"device must be cpu, cuda or cuda:N, got {value!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device must be one that PyTorch sees, got {str(value)!r} without a GPU")
    return device


def _shown(value: object) -> str:
    """Return a short value as it is written, and the type of any other."""
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
        return text if len(text) <= 60 else text[:59] + "…"
    return f"an object of type {type(value).__name__}"

"""Configurations as frozen dataclasses: checks of their fields, copies with changes, and rebuilding from JSON."""

import dataclasses
import math
from typing import Any, TypeVar

import numpy as np

from simsid.errors import ConfigError

LARGEST = {
    "image_size": 8192,
    "patches": 64,
    "width": 1024,
    "discriminator_width": 1024,
    "levels": 10,
    "items": 1_000_000,
    "decoder_items": 1_000_000,
    "topk": 1_000_000,
    "heads": 1024,
    "trees": 10_000,
    "sample": 1_000_000,
    "epochs": 1_000_000,
    "batch_size": 1_000_000,
    "generator_every": 1_000_000,
    "patience": 1_000_000,
    "seed": 2**62,
}
"""No configuration of use is larger; a damaged or hostile file must not make the network's size absurd."""

Fields = TypeVar("Fields")


def replaced(config: Fields, changes: dict[str, object]) -> Fields:
    """Return a copy of a configuration with `changes`; an unknown field is an error that lists the known ones."""
    _check_names(type(config), changes)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def from_dict(kind: type[Fields], values: object) -> Fields:
    """Rebuild a configuration from plain values; absent fields keep their defaults, unknown ones are an error."""
    return kind(**_check_names(kind, values))


def check_fields(config: Any, at_least: dict[str, int]) -> None:
    """Check the type of every field and the bounds of numbers; raise `ConfigError` naming the field."""
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if isinstance(value, np.generic):
            value = value.item()
            # The configuration is frozen, and JSON has no numpy numbers.
            object.__setattr__(config, entry.name, value)
        _check_type(entry, value)
    for name, low in at_least.items():
        value, high = getattr(config, name), LARGEST.get(name, math.inf)
        require(low <= value <= high, name, f"at least {low}" if value < low else f"at most {high}", value)


def require(holds: bool, name: str, expected: str, value: object) -> None:
    """Raise `ConfigError` with the field, what was expected and what came, unless the condition `holds`."""
    if not holds:
        raise ConfigError(f"{name} must be {expected}, got {value!r}")


def _check_names(kind: type, values: object) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"a configuration must be a dictionary of fields, got {values!r}")
    known = [entry.name for entry in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            raise ConfigError(f"{name!r} is not a configuration field; the fields are {', '.join(known)}")
    return values


def _check_type(entry: dataclasses.Field, value: object) -> None:
    choices = getattr(entry.type, "__args__", None)
    if entry.type is str:
        require(isinstance(value, str), entry.name, "a string", value)
    elif choices:
        require(value in choices, entry.name, f"one of {', '.join(map(repr, choices))}", value)
    elif entry.type is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # A whole number beyond the floats compares as smaller than infinity and then overflows.
        overflows = isinstance(value, int) and abs(value) > 2**1000
        require(number and not overflows, entry.name, "a number", value)
    else:
        is_bool = isinstance(value, bool)
        fits = is_bool if entry.type is bool else isinstance(value, int) and not is_bool
        require(fits, entry.name, "true or false" if entry.type is bool else "a whole number", value)

"""Says in which setting a folder differs from what is asked for."""

from collections.abc import Mapping

from simsid.errors import RunError

NAMES = {
    "data": "data set",
    "train": "number of training images",
    "normal_share": "share of normal training images",
    "minutes": "budget",
}
"""How a message calls a setting, where it is not by its key."""


def refuse_difference(holder: str, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Compare the settings of a folder with those asked for; keys that only the folder has do not matter.

    Args:
        holder: the beginning of the message, such as `studies/topk holds a study`.
        found: settings that the folder was started with.
        wanted: settings asked for.

    Raises:
        RunError: they differ; the message names the first setting, the value asked for and the folder's.
    """
    for key, value in wanted.items():
        other, what = found.get(key), NAMES.get(key, key)
        if other == value:
            continue
        if isinstance(value, dict) and isinstance(other, dict):
            field = next(name for name in (*value, *other) if value.get(name) != other.get(name))
            value, other, what = value.get(field), other.get(field), f"{key} setting {field}"
        raise RunError(
            f"{holder} with another {what}: expected {value!r}, got {other!r}; repeat the options it was started with, "
            "or choose another folder with -o"
        )

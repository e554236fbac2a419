"""Reads single DICOM elements; a value that cannot be read is reported by the element's name, never by its text."""

from pydicom.datadict import dictionary_description
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID

from simsid.errors import ReadError

_BINARY = ("FD", "FL", "SL", "SS", "UL", "US")


def element_name(keyword: "str | BaseTag") -> str:
    """Return such as `Rows (0028,0010)`; a tag outside the standard is not quoted, since damage can put text there."""
    tag = Tag(keyword)
    try:
        return f"{dictionary_description(tag)} {tag}"
    except KeyError:
        return "that is not in the standard"


def unreadable(keyword: "str | BaseTag", expected: str = "") -> ReadError:
    """Return the error for an element that cannot be read."""
    return ReadError(
        f"the DICOM element {element_name(keyword)} " + (f"is not {expected}" if expected else "cannot be read")
    )


def integer(dataset: Dataset, keyword: str, default: int) -> int:
    """Return an element as a whole number, `default` for an absent or empty one."""
    try:
        value = dataset.get(keyword)
        return default if value is None or value == "" else int(value)
    except Exception:  # pydicom converts on access, and raises a dozen classes
        raise unreadable(keyword, "a whole number") from None


def text(dataset: Dataset, keyword: str) -> str:
    """Return an element as text in upper case, empty for an absent one."""
    try:
        return str(dataset.get(keyword) or "").strip(" \0").upper()
    except Exception:
        raise unreadable(keyword) from None


def sequence_item(dataset: Dataset, keyword: str) -> Dataset | None:
    """Return the first item of a sequence, `None` for an absent or empty one."""
    try:
        items = dataset.get(keyword)
        item = items[0] if items else None
    except Exception:
        raise unreadable(keyword) from None
    if item is not None and not isinstance(item, Dataset):
        raise unreadable(keyword, "a sequence")
    return item


def number(dataset: Dataset, keyword: str) -> float | None:
    """Return the first value of a decimal string, `None` for an absent or empty one; a decimal comma is accepted.

    The text is converted here because pydicom raises for a comma when the element is first accessed.
    """
    try:
        element = dataset.get_item(keyword)
        value = None if element is None else element.value
        if isinstance(element, RawDataElement):
            if element.VR in _BINARY:
                value = dataset[keyword].value
            elif value is not None:
                value = value.decode("ascii").split("\\")[0]
        if isinstance(value, (MultiValue, list)):
            value = value[0] if len(value) else None
        if isinstance(value, str):
            value = value.strip(" \0").replace(",", ".")
        return None if value is None or value == "" else float(value)
    except Exception:
        raise unreadable(keyword, "a number") from None


def uid_name(uid: object) -> str:
    """Return the standard's name of a UID, `""` for any other text: damage may have put a patient's name there."""
    value = str(uid)
    name = UID(value).name
    return name if name != value else ""

"""Every error that simsid raises about its input or its surroundings.

The command line prints a `SimsidError` as one sentence; any other exception is a defect and shows its traceback. Where
Python has a usual type for the mistake, the class derives from it too, so that `except ValueError` works as expected.
"""


class SimsidError(Exception):
    """Base of all errors that simsid raises on purpose; the message is one sentence that names the remedy."""


class InputError(SimsidError, ValueError):
    """An argument, option or file holds a value that cannot be used; the message says what was expected."""


class InputTypeError(SimsidError, TypeError):
    """An argument is an object of a type that cannot be used; the message says what was expected."""


class ConfigError(InputError):
    """A configuration that cannot be built; the message names the field."""


class UsageError(InputError):
    """Options of the command line that contradict each other or the files they name."""


class ReadError(SimsidError):
    """An image file cannot be read; the message is one sentence without the path."""


class ConversionError(InputError):
    """A checkpoint of the released code that cannot be converted."""


class ExportError(SimsidError, RuntimeError):
    """A model that cannot be exported, or whose exported program scores differently."""


class CheckpointError(SimsidError, RuntimeError):
    """A folder that holds no readable checkpoint; the message names the file and what is wrong with it."""


class CalibrationError(SimsidError, RuntimeError):
    """A score was asked of a model that has not been calibrated on normal images."""


class RunError(SimsidError, RuntimeError):
    """A run folder that is in use, already taken, or does not fit what was asked of it."""


class ArchiveError(SimsidError, RuntimeError):
    """A scoring that cannot resume: it is in use, was begun with other options, or its files have changed."""


class ProcessGroupError(SimsidError, RuntimeError):
    """Environment variables that describe no process group, or one that asks for more than the machine has."""


class NonFiniteError(SimsidError, FloatingPointError):
    """Images, weights, a loss or a gradient are NaN or infinite; the last checkpoint is intact."""


class IncompleteError(SimsidError, RuntimeError):
    """The main result is saved, and a later step failed; the command line's exit status is 1."""


class DeviceMemoryError(SimsidError, RuntimeError):
    """A GPU has too little free memory; the message names the batch size and the remedy."""


def printable(text: str) -> str:
    """Return a text, such as a file name, for one line of a terminal.

    Control characters (a name may hold a carriage return or an escape sequence) and bytes that are not UTF-8 appear as
    backslash escapes.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )

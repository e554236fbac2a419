"""Finds the images below a folder."""

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from simsid.data.reading import identify_file

# Includes kinds that the reader refuses, so that each such file is reported instead of passed over.
IMAGE_EXTENSIONS = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".tif", ".tiff", ".bmp", ".dcm", ".dicom", ".gif", ".webp", ".jp2", ".j2k")
)
# Copies of file attributes that macOS adds to archives, and the index of a DICOM medium.
_SKIPPED_FOLDERS = frozenset(("__MACOSX",))
_SKIPPED_FILES = frozenset(("DICOMDIR",))


def walk(folder: str, exclude: Sequence[str] = ()) -> Iterator[str]:
    """Yield every file below a folder without hidden ones; links are followed, each folder once.

    A folder's own files come first, by name, then its folders, by name. A folder below that cannot be listed is
    yielded itself, so that reading it fails and is reported; `open_file` gives the reason. Memory holds the names of
    the folders still to visit and one number per folder seen, never all files.

    Args:
        exclude: patterns of paths to leave out, see `excluded`.

    Raises:
        OSError: `folder` itself cannot be listed.
    """
    seen: set[int] = set()
    pending = [folder]
    while pending:
        here = pending.pop()
        try:
            status = os.stat(here)
            identity = status.st_dev << 64 | status.st_ino
            if identity in seen:
                continue
            with os.scandir(here) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            if here == folder:
                raise
            yield here
            continue
        seen.add(identity)
        folders = []
        for entry in entries:
            if entry.name.startswith(".") or (exclude and excluded(os.path.relpath(entry.path, folder), exclude)):
                continue
            if _is_folder(entry):
                folders += [entry.path] if entry.name not in _SKIPPED_FOLDERS else []
            elif entry.name not in _SKIPPED_FILES:
                yield entry.path
        pending += reversed(folders)


def excluded(path: str, patterns: Sequence[str]) -> bool:
    """Return whether a path, relative to its data set's folder, matches one of the shell patterns.

    A pattern with a slash is matched against the whole path and that of every folder above it, where `*` also matches
    slashes (`"*/masks"`, `"raw/*.png"`); one without a slash is matched against every name on the path (`"masks"`,
    `"*_mask.png"`). Case matters.
    """
    parts = path.replace(os.sep, "/").split("/")
    wholes = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(text, pattern) for pattern in patterns for text in (wholes if "/" in pattern else parts))


def patterns(exclude: str | Sequence[str]) -> tuple[str, ...]:
    """Return exclude patterns as a tuple; one pattern may be given as a string."""
    return (exclude,) if isinstance(exclude, str) else tuple(exclude)


def is_image(path: str) -> bool:
    """Return whether a file is to be read: an image by its extension or first bytes (DICOM often has no extension).

    So is a file that exists but cannot be opened: it may be an image, and must not be skipped without notice.
    """
    if os.path.splitext(path)[1].lower() in IMAGE_EXTENSIONS or identify_file(path):
        return True
    return os.path.isfile(path) and not os.access(path, os.R_OK)


def iter_images(folder: str, exclude: Sequence[str] = ()) -> Iterator[str]:
    """Yield the images below a folder, and folders that cannot be listed, in the order of `walk`."""
    return (path for path in walk(folder, exclude) if is_image(path) or os.path.isdir(path))


def list_images(folder: str, exclude: Sequence[str] = ()) -> list[str]:
    """Return what `iter_images` yields."""
    return list(iter_images(folder, exclude))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False

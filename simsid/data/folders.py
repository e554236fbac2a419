"""Finds the images below a folder."""

import os
from collections.abc import Iterator

from simsid.data.reading import identify_file

# With the kinds that the reader refuses: who has such films should hear it.
IMAGE_EXTENSIONS = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".tif", ".tiff", ".bmp", ".dcm", ".dicom", ".gif", ".webp", ".jp2", ".j2k")
)
# Names that hold no image of their own: what macOS packs beside every file, and the index of a DICOM medium.
_SKIPPED_FOLDERS = frozenset(("__MACOSX",))
_SKIPPED_FILES = frozenset(("DICOMDIR",))


def walk(folder: str) -> Iterator[str]:
    """Yield every file below a folder without hidden ones; links are followed, each folder once.

    A folder's own files come first, by name, then its folders, by name. Held at a time are the names in the folders on
    the way down, and one number for every folder seen; never all files.
    """
    seen: set[int] = set()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        status = os.stat(here)
        identity = status.st_dev << 64 | status.st_ino
        if identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _SKIPPED_FOLDERS)
        for name in sorted(files):
            if not name.startswith(".") and name not in _SKIPPED_FILES:
                yield os.path.join(here, name)


def is_image(path: str) -> bool:
    """Whether a file is to be read: by an image's extension, else by its first bytes (DICOM often has no extension)."""
    return os.path.splitext(path)[1].lower() in IMAGE_EXTENSIONS or bool(identify_file(path))


def iter_images(folder: str) -> Iterator[str]:
    """Yield the images below a folder, in the order of `walk`."""
    return filter(is_image, walk(folder))


def list_images(folder: str) -> list[str]:
    """Return the images below a folder, in the order of `walk`."""
    return list(iter_images(folder))


def _raise(error: OSError) -> None:
    raise error

"""Walking folders, and opening files."""

import os

import pytest

from simsid.data.files import open_file
from simsid.data.folders import excluded, iter_images, walk
from simsid.errors import ReadError


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def below(folder, paths):
    return [os.path.relpath(path, folder) for path in paths]


@pytest.fixture
def locked(monkeypatch):
    """Make folders named `locked` unreadable, also for root, whom file modes do not bind."""
    scandir = os.scandir

    def refuse(path="."):
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


def test_walk_yields_a_folder_that_cannot_be_listed_and_continues(tmp_path, locked):
    touch(tmp_path, "b/1.png", "locked/2.png", "n/locked/3.png", "n/4.txt", "z/5.png")
    assert below(tmp_path, walk(str(tmp_path))) == ["b/1.png", "locked", "n/4.txt", "n/locked", "z/5.png"]
    assert below(tmp_path, iter_images(str(tmp_path))) == ["b/1.png", "locked", "n/locked", "z/5.png"]
    with pytest.raises(PermissionError):
        list(walk(str(tmp_path / "locked")))
    with pytest.raises(ReadError, match=r"^the folder cannot be listed: Permission denied$"):
        open_file(tmp_path / "locked")


def test_file_that_cannot_be_opened_is_not_skipped(tmp_path, monkeypatch):
    touch(tmp_path, "IM0001", "notes")
    (tmp_path / "absent").symlink_to(tmp_path / "nowhere")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not path.endswith("IM0001"))
    assert below(tmp_path, iter_images(str(tmp_path))) == ["IM0001"]


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ((), ["1.png", "1_mask.png", "masks/2.png", "p/masks/3.png", "p/q/4.png"]),
        (("masks",), ["1.png", "1_mask.png", "p/q/4.png"]),
        (("*_mask.png", "q"), ["1.png", "masks/2.png", "p/masks/3.png"]),
        (("masks/*",), ["1.png", "1_mask.png", "p/masks/3.png", "p/q/4.png"]),
        (("*/masks",), ["1.png", "1_mask.png", "masks/2.png", "p/q/4.png"]),
        (("p/*.png",), ["1.png", "1_mask.png", "masks/2.png"]),
        (("MASKS", "ask"), ["1.png", "1_mask.png", "masks/2.png", "p/masks/3.png", "p/q/4.png"]),
    ],
    ids=["none", "name of folders", "two names", "below a folder", "folder at any depth", "slashes", "other case"],
)
def test_walk_leaves_out_what_a_pattern_names(tmp_path, pattern, kept):
    touch(tmp_path, "1.png", "1_mask.png", "masks/2.png", "p/masks/3.png", "p/q/4.png")
    assert below(tmp_path, walk(str(tmp_path), pattern)) == kept
    assert [name for name in below(tmp_path, walk(str(tmp_path))) if not excluded(name, pattern)] == kept


def test_excluded_folders_are_not_listed(tmp_path, locked):
    touch(tmp_path, "locked/1.png", "2.png")
    assert below(tmp_path, walk(str(tmp_path), ["locked"])) == ["2.png"]


def test_open_file_names_what_is_not_a_readable_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    touch(tmp_path, "file")
    (tmp_path / "empty").touch()
    for name, message in (
        (".", "the path is a folder, not a file"),
        ("pipe", "the path is not a regular file"),
        ("empty", "the file is empty"),
        ("absent", "the file cannot be read: No such file or directory"),
        ("file/below", "the file cannot be read: Not a directory"),
    ):
        with pytest.raises(ReadError, match=f"^{message}$"):
            open_file(tmp_path / name)
    with open_file(tmp_path / "file") as file:
        assert file.read() == b"x"

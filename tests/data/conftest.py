"""Fixtures that several test files of images share."""

import pytest
from sample_files import gray, save


@pytest.fixture
def folder(tmp_path):
    """Five 8-bit images, each of its own gray but for the last column, and a broken file in the middle."""
    for i in range(5):
        save(tmp_path / f"{i}.png", gray(10 + i, 50 * i))
    (tmp_path / "2b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return sorted(tmp_path.iterdir())

"""Damaged files of every format give an image or one sentence, in bounded time, and never end the process."""

import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("fuzz.py")
FILES = 200


def test_damaged_files_give_a_finite_image_or_a_read_error():
    """In a process of its own: a decoder that aborts must not take the tests with it."""
    for module in ("gdcm", "openjpeg", "jpeg_ls"):
        pytest.importorskip(module, reason="needs the decoders of the extra 'dicom'")
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--files", str(FILES), "--seed", "0"],
        capture_output=True,
        text=True,
        timeout=600,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    print(result.stdout)  # the seeds, should anything fail
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line for line in result.stdout.splitlines() if ": seed 0, files 0 to " in line]
    assert len(lines) == 21
    assert sum(" refused, slowest" in line for line in lines) == len(lines)
    # Damage that is never noticed, or that always is, would test one half only.
    assert sum(" 0 refused" in line for line in lines) == 0
    assert sum("-> 0 images" in line for line in lines) < 6

"""One film is scored without importing what it does not need."""

import pathlib
import subprocess
import sys

import tiny

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "one_film.py"


def test_one_film_needs_no_compiler_and_no_library_of_curves(tmp_path):
    command = [sys.executable, SCRIPT, "zhanglab", tiny.film(tmp_path / "film.png"), "--threads", "1"]
    done = subprocess.run(command, env=tiny.ENVIRONMENT, cwd=SCRIPT.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 files scored" in done.stdout and "report: " in done.stdout
    assert done.stdout.endswith("heavy modules imported on the way: none\n")

"""Every shell command of the pages: those of simsid run at tiny sizes, the others name what exists."""

import pathlib
import re
import shutil
import subprocess

import documents
import pytest
import tiny

from simsid import robustness
from simsid.commands import main as command_line

COMPUTING = ("train", "evaluate", "score", "adapt", "calibrate", "demo", "report", "study")
REDUCED = {
    "demo": ["--epochs", "1", "--images", "16"],
    "study": ["--epochs", "1", "--width", "4", "--images", "4", "--seeds", "1"],
    "pixel_knn": ["--image-size", "48"],
    "pixel_pca": ["--image-size", "48"],
    "features": ["--image-size", "64", "--items", "5", "--components", "6"],
    "feature_knn": ["--image-size", "64", "--components", "6"],
}
"""Options of a command, or of a preset of `train`, that take the place of those in the page or join them."""
STUDIED = ["no_skip", "simsid 100 %", "pixel_knn", "coupled"]
"""Rows of a study that take the place of its own; `--budget` alone would measure every one."""
NETWORK = [*tiny.OPTIONS, "--epochs", "1", "--batch-size", "4"]

PAGES = [page for page in documents.PAGES if documents.commands(page) and page not in documents.ELSEWHERE]


def option(words, *names):
    """Return the value of the first of the options, or None."""
    return next((words[words.index(name) + 1] for name in names if name in words), None)


def reduced(words):
    """Return a simsid command with tiny sizes, one epoch and one thread."""
    command = words[1]
    added = REDUCED.get(command, [])
    if command == "train" and "--resume" not in words:
        added = REDUCED.get(option(words, "--preset"), NETWORK)
    if command in COMPUTING and "--threads" not in words:
        added = [*added, "--threads", "1"]
    words = list(words)
    if command == "study":
        words = words[: words.index("--only")] if "--only" in words else words
        added = [*(added if "--budget" not in words else ["--budget", "0.001", *added[4:]]), "--only", *STUDIED]
    for name in added[::2]:
        if name in words:
            del words[words.index(name) : words.index(name) + 2]
    return words[1:] + added


@pytest.fixture(scope="session")
def done():
    """The commands of earlier pages, whose results lie in the folder: a command that two pages show runs once."""
    return set()


def run_simsid(words, capsys):
    """Run a command in this process. What an earlier page left in the folder that it writes is removed."""
    output = option(words, "-o") or ("simsid-demo" if words[1] == "demo" else None)
    if output:
        shutil.rmtree(output, ignore_errors=True)
    with pytest.raises(SystemExit) as stop:
        command_line.main(reduced(words))
    printed = capsys.readouterr()
    assert stop.value.code == 0, (words, printed.out, printed.err)
    assert output is None or any(pathlib.Path(output).iterdir()), words


def run_torchrun(words, monkeypatch, capsys):
    """Run the command as the only process of a group; tests/test_distributed.py and tests/scoring start several."""
    assert words[1] == "--nproc-per-node" and int(words[2]) > 1 and words[3:5] == ["-m", "simsid"], words
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    run_simsid(words[4:], capsys)


def check_pip(words):
    """The extras that are installed exist."""
    setup = (documents.ROOT / "setup.py").read_text("utf-8")
    for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
        assert re.search(rf'^        "{extra}": ', setup, re.M), words


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_run(page, world, done, one_figure, monkeypatch, capsys):
    monkeypatch.setattr(robustness, "SHIFTS", robustness.SHIFTS[:1])
    for words in documents.commands(page):
        if tuple(words) in done:
            continue
        done.add(tuple(words))
        match words[0]:
            case "simsid":
                run_simsid(words, capsys)
            case "torchrun":
                run_torchrun(words, monkeypatch, capsys)
            case "pip":
                check_pip(words)
            case "make":
                assert re.search(rf"^{words[1]}:", (documents.ROOT / "Makefile").read_text("utf-8"), re.M), words
            case "pytest":
                assert all((documents.ROOT / word).exists() for word in words[1:] if "/" in word), words
            case "python":
                assert (documents.ROOT / words[1]).is_file(), words
            case "chromium":
                pass  # test_screenshot_of_the_report_is_taken_as_the_page_says
            case _:
                pytest.fail(f"{page}: no test runs {words}")


@pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not installed")
def test_screenshot_of_the_report_is_taken_as_the_page_says(tmp_path):
    (words,) = [words for words in documents.commands("docs/reproducibility.md") if words[0] == "chromium"]
    (tmp_path / "simsid-demo").mkdir()
    (tmp_path / "simsid-demo" / "report.html").write_text("<h1>report</h1>")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    subprocess.run([words[0], profile, *words[1:]], cwd=tmp_path, check=True, capture_output=True, timeout=100)
    shown = (documents.ROOT / "docs" / "report.png").read_bytes()
    assert (tmp_path / "report.png").read_bytes()[16:24] == shown[16:24], "width and height in the PNG header differ"


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_targets_run_what_ci_and_the_hooks_run():
    steps = {
        target: subprocess.run(
            ["make", "-n", target], cwd=documents.ROOT, check=True, capture_output=True, text=True
        ).stdout
        for target in ("test", "lint", "types", "bench", "docs")
    }
    ci = (documents.ROOT / ".ci/run").read_text("utf-8").splitlines()
    hooks = (documents.ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    assert steps["test"].strip() == "python -m pytest"
    for command in ("ruff check", "ruff format --check", "mypy"):
        assert f"python -m {command}" in steps["lint"] + steps["types"]
        assert f"{command} ." in ci or command in ci
        assert f"entry: {command}" in hooks
    assert "language: system" in hooks and "language: python" not in hooks and "http" not in hooks
    for path in re.findall(r"pytest (\S+/\S*)", steps["bench"] + steps["docs"]):
        assert (documents.ROOT / path).is_dir()

"""The pages and their fenced blocks, as the tests read them."""

import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
"""Text of every page by its path below the repository."""

ELSEWHERE = {"docs/performance.md"}
"""Pages whose commands need a GPU or time something; tests/test_benchmarks.py runs the benchmarks at tiny sizes."""


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.S | re.M)


def commands(page: str) -> list[list[str]]:
    """Return the words of every shell command, without comments; `a && b` is two commands."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "&&" in words:
                cut = words.index("&&")
                found.append(words[:cut])
                words = words[cut + 1 :]
            if words:
                found.append(words)
    return found


def table(page: str, head: str) -> list[list[str]]:
    """Return the cells of a table's rows; `head` is the first cell of its heading."""
    lines = PAGES[page].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {head} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows

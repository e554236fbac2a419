"""Every message on the page of troubleshooting is one that simsid prints today."""

import ast
import functools
import re
import shlex
import shutil

import documents
import pytest
import tiny
import torch

from simsid.commands import main as command_line

PAGE = "docs/troubleshooting.md"
COMMANDS = [
    tuple(part.split("\n", 1))
    for block in documents.blocks(PAGE, "console")
    for part in block.strip().removeprefix("$ ").split("\n$ ")
]


@pytest.fixture(scope="module")
def place(world_folder):
    """The folder of the pages with what their commands lack."""
    tiny.model().save(world_folder / "runs" / "uncalibrated")
    (world_folder / "empty").mkdir(exist_ok=True)
    tiny.damaged(world_folder)
    (world_folder / "names.csv").write_text("file,label\na.png,0\n")
    (world_folder / "gone.csv").write_text("path,label\ngone.png,0\nfilm.png,1\n")
    return world_folder


@pytest.mark.parametrize(("command", "message"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_command_fails_with_the_message(command, message, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = shlex.split(command)[1:]
    for output in ("scores", "here", "zhanglab"):  # where the commands of other pages may have written
        shutil.rmtree(output, ignore_errors=True)
    with pytest.raises(SystemExit) as stop:
        command_line.main(words)
    printed = capsys.readouterr()
    shown, expected = (printed.out + printed.err).replace(str(place), "/home/me").splitlines(), message.splitlines()
    # Notes on a small calibration may follow the message, once in a process.
    shown = [line for line in shown if not line.startswith("simsid: note: ") or line in expected]
    assert stop.value.code == 2 and shown[-len(expected) :] == expected


@functools.cache
def strings():
    """Return every text in the source, with an ellipsis for each value in it."""
    found = []
    for folder in ("simsid", "kernels"):
        for path in (documents.ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


@pytest.mark.parametrize("message", [block.strip() for block in documents.blocks(PAGE, "text")])
def test_message_stands_in_the_source(message):
    assert any(message.removesuffix(" …") in text for text in strings())


def test_every_entry_says_what_to_do():
    entries = re.split(r"^```(?:console|text)\n.*?^```\n", documents.PAGES[PAGE], flags=re.S | re.M)[1:]
    silent = [number for number, entry in enumerate(entries) if not entry.split("\n## ")[0].strip()]
    assert len(entries) >= 25 and not silent, silent

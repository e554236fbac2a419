"""The command line called in this process, and a model and images for it."""

import types

import pytest
import tiny

from simsid.commands import main as command_line

COMPUTING = ("train", "evaluate", "score", "calibrate", "convert", "demo", "report")
"""Commands that take `--threads`; with one thread they do not compete with other work for the cores."""


@pytest.fixture
def simsid(capsys, monkeypatch, tmp_path):
    """Run a command in an empty working directory; returns its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        words = [str(argument) for argument in arguments]
        if words and words[0] in COMPUTING and not {"--threads", "--help"} & set(words):
            words += ["--threads", "1"]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command_line.main(words)
        printed = capsys.readouterr()
        return types.SimpleNamespace(code=stop.value.code, out=printed.out, err=printed.err)

    return run


@pytest.fixture(autouse=True)
def few_pixels(one_figure):
    """Nothing here looks at the figures of a report; tests/report does."""


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.calibrated(folder)
    return folder


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    tiny.films(folder, 7)
    return folder


@pytest.fixture(scope="session")
def zhanglab(tmp_path_factory):
    return tiny.zhanglab(tmp_path_factory.mktemp("zhanglab") / "chest_xray")

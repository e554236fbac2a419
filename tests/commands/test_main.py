"""The program itself: help, exit statuses, one sentence for each error, signals and pipes."""

import builtins
import os
import re
import subprocess
import sys

import joblib
import pytest
import tiny
import torch

from simsid import data, errors
from simsid.commands import main as command_line
from simsid.commands.scan import Scan
from simsid.config import PresetName
from simsid.models import presets


def raising(error):
    """A `run` of a command that raises `error`."""

    def run(self):
        raise error

    return run


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_help_of_every_command_shows_its_summary(simsid, command):
    done = simsid(command, "--help")
    assert done.code == 0 and done.err == ""
    summary = re.split(r"[:,.]", command_line.COMMANDS[command].__doc__)[0]
    assert summary[:40] in " ".join(done.out.split())
    assert "tyro" not in done.out


def test_help_lists_commands_and_version_prints_a_number(simsid):
    done = simsid("--help")
    assert done.code == 0
    assert all(command in done.out for command in command_line.COMMANDS)
    assert command_line.RESEARCH in " ".join(done.out.split())
    assert re.fullmatch(r"simsid \d+\.\d+\.\d+\n", simsid("--version").out)
    assert simsid().code == simsid("frobnicate").code == 2


def test_preset_names_are_those_of_the_models():
    assert list(PresetName.__args__) == list(presets.PRESETS)


@pytest.mark.parametrize(
    "kind", sorted({kind for kind in vars(errors).values() if isinstance(kind, type)}, key=lambda kind: kind.__name__)
)
def test_every_simsid_error_prints_one_sentence(simsid, monkeypatch, kind):
    monkeypatch.setattr(Scan, "run", raising(kind("the sentence")))
    done = simsid("scan", ".")
    assert done.err == "simsid: the sentence\n" and done.out == ""
    assert done.code == (1 if kind is errors.IncompleteError else 2)


@pytest.mark.parametrize("error", [RuntimeError("a defect"), ValueError("a defect"), OSError("without a reason")])
def test_other_exceptions_show_a_traceback(monkeypatch, error):
    monkeypatch.setattr(Scan, "run", raising(error))
    with pytest.raises(type(error), match=str(error)):
        command_line.main(["scan", "."])


def test_errors_of_the_file_system_print_the_path(simsid, monkeypatch):
    monkeypatch.setattr(Scan, "run", raising(OSError(28, "No space left on device", "a\nb")))
    done = simsid("scan", ".")
    assert (done.code, done.err) == (2, "simsid: a\\nb: No space left on device\n")


def test_ctrl_c_exits_130(simsid, monkeypatch):
    monkeypatch.setattr(Scan, "run", raising(KeyboardInterrupt()))
    assert simsid("scan", ".").code == 130


def test_ctrl_c_during_the_imports_of_a_command_exits_130(simsid, monkeypatch, model, films):
    real = builtins.__import__

    def interrupted(name, *arguments, **options):
        if name == "simsid.scoring":
            raise KeyboardInterrupt
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    done = simsid("score", model, films, "-o", "out")
    assert (done.code, done.out, done.err) == (130, "", "")


INTERRUPTED_IMPORT = """
import importlib.abc, signal, sys

class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "torch":
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
sys.meta_path.insert(0, Interrupt())
from simsid.commands.main import main
main(["score", "model", ".", "-o", "out"])
"""


def test_sigint_while_pytorch_is_imported_exits_130_without_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT], env=tiny.ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ((), {}, [2]),
        (("--threads", "5"), {}, [5]),
        ((), {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}, [1]),
    ],
    ids=["the quota of a container", "as asked", "two ranks on a machine"],
)
def test_threads_are_this_process_fraction_of_the_cores(model, monkeypatch, options, environment, expected):
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # Refused after the device is prepared, before anything is computed.
    with pytest.raises(SystemExit) as stop:
        command_line.main(["score", str(model), "nowhere", "-o", "out", "--device", "cpu", *options])
    assert stop.value.code == 2 and used == expected


def test_commands_other_than_train_and_score_refuse_several_processes(simsid, monkeypatch, model, films):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for line in (["evaluate", model, films], ["calibrate", model, films]):
        done = simsid(*line)
        assert done.code == 2
        assert done.err == f"simsid: rank 1: {line[0]} runs as a single process; start it without torchrun\n"


def test_warnings_are_notes_of_one_line(simsid, monkeypatch):
    def warn(self):
        import warnings

        warnings.warn("a hazard", stacklevel=1)
        return 0

    monkeypatch.setattr(Scan, "run", warn)
    assert simsid("scan", ".").err == "simsid: note: a hazard\n"


def test_names_that_are_not_text_are_printed_escaped(simsid, tmp_path):
    tiny.films(tmp_path / "mixed", 2)
    tiny.damaged(tmp_path / "mixed", os.fsdecode(b"caf\xe9.png"))
    done = simsid("scan", "mixed")
    assert done.code == 1 and "caf\\udce9.png" in done.out
    assert data.Radiographs(tmp_path / "mixed").records


PIPES = [("doctor", "head -n 1"), ("train --help", "head -n 1"), ("scan {films}", "true")]


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize(("command", "reader"), PIPES, ids=[command for command, _ in PIPES])
def test_a_reader_that_closes_the_pipe_causes_no_message(films, tmp_path, command, reader):
    script = f"{sys.executable} -m simsid {command.format(films=films)} 2>err | {reader}; echo ${{PIPESTATUS[0]}}"
    environment = {**tiny.ENVIRONMENT, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(["bash", "-c", script], env=environment, cwd=tmp_path, capture_output=True)
    assert (tmp_path / "err").read_text() == ""
    assert done.stdout.splitlines()[-1] in (b"0", b"141")

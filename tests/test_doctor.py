"""What the doctor reports, and that each gap comes with the command that fixes it."""

import ast
import importlib.metadata
import pathlib
import re

import pytest

from simsid import doctor
from simsid.commands import main as command_line

SETUP = pathlib.Path(__file__).parents[1] / "setup.py"


def by_subject(findings):
    return {finding.subject: finding for finding in findings}


def test_required_versions_are_those_of_the_installation():
    tree = ast.parse(SETUP.read_text("utf-8"))
    (needed,) = [
        keyword.value for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords
        if keyword.arg == "install_requires"
    ]  # fmt: skip
    floors = dict(text.split(">=") for text in map(ast.literal_eval, needed.elts) if ">=" in text)
    assert floors == doctor.REQUIRED


def test_a_complete_installation_has_no_failure():
    findings = doctor.examine()
    assert not [finding for finding in findings if finding.mark == "FAIL"]
    subjects = by_subject(findings)
    assert len(subjects) == len(findings)
    assert {"python", "torch", "cpu", "kernel space_aware_memory", "kernel neighbor_attention"} <= subjects.keys()
    assert {"decoder JPEG", "decoder DICOM JPEG 2000", "tensorboard", "triton"} <= subjects.keys()
    assert subjects["torch"].text == importlib.metadata.version("torch")
    assert "PyTorch" in subjects["kernel space_aware_memory"].text


def test_missing_and_old_packages_are_named_with_their_remedy(monkeypatch):
    installed = {"torch": "2.9.1+cpu", "numpy": "1.26", "tensorboard": None, "triton": None}
    real = importlib.metadata.version

    def version(name):
        if name == "matplotlib":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name] if name in installed else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    subjects = by_subject(doctor.examine())
    assert (subjects["torch"].mark, subjects["torch"].remedy) == ("FAIL", "pip install --upgrade 'torch>=2.10'")
    assert subjects["torch"].text == "2.9.1+cpu, needs 2.10 or later"
    assert (subjects["matplotlib"].mark, subjects["matplotlib"].remedy) == ("FAIL", "pip install 'matplotlib>=3.8'")
    assert subjects["numpy"].mark == "ok"
    assert subjects["tensorboard"].mark == "note" and "simsid[tensorboard]" in subjects["tensorboard"].remedy
    for finding in subjects.values():
        assert finding.mark == "ok" or finding.remedy or finding.subject.startswith("kernel"), finding


def test_a_pytorch_that_cannot_be_loaded_is_reported(monkeypatch):
    monkeypatch.setattr(doctor, "torch", None)
    monkeypatch.setattr(doctor, "TORCH_ERROR", "libcudart.so.13: cannot open shared object file", raising=False)
    failed = [finding for finding in doctor.examine() if finding.mark == "FAIL"]
    assert len(failed) == 1 and "libcudart" in failed[0].text and failed[0].remedy.startswith("pip install")


@pytest.mark.parametrize(
    ("older", "newer"), [("2.9.1", "2.10"), ("0.4.3", "0.4.10"), ("1.26.4", "2.0.0rc1"), ("2.10.0+cpu", "2.11.0+cpu")]
)
def test_versions_compare_by_number(older, newer):
    assert doctor._parts(older) < doctor._parts(newer)


def test_the_command_prints_findings_and_exits_1_when_something_is_missing(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main(["doctor"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and re.search(r"^ok +torch +\d", printed, re.M)
    monkeypatch.setattr(doctor, "REQUIRED", {"no-such-package": "1.0"})
    with pytest.raises(SystemExit) as stop:
        command_line.main(["doctor"])
    assert stop.value.code == 1
    assert re.search(
        r"^FAIL no-such-package .*\n +-> pip install 'no-such-package>=1.0'$", capsys.readouterr().out, re.M
    )

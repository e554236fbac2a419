"""What the doctor finds, and that each gap comes with the command that fixes it."""

import importlib.metadata
import re

import pytest

from simsid import doctor
from simsid.commands import main as cli


def by_subject(findings):
    return {finding.subject: finding for finding in findings}


def test_requirements_are_those_of_the_installation_without_extras():
    names = {requirement.name for requirement in doctor.required()}
    assert {"torch", "numpy", "pillow", "scikit-learn", "pydicom", "jinja2"} <= names
    assert not names & {"pytest", "ruff", "tensorboard", "pylibjpeg"}


def test_checkout_that_is_not_installed_is_a_note(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    (finding,) = [finding for finding in doctor.examine() if finding.subject == "simsid"]
    assert finding.mark == "note" and finding.remedy == "pip install -c constraints.txt -e ."


def test_a_sound_installation_passes():
    findings = doctor.examine()
    assert not [finding for finding in findings if finding.mark == "FAIL"]
    subjects = by_subject(findings)
    assert len(subjects) == len(findings)
    assert {"python", "torch", "cpu", "kernel space_aware_memory", "kernel neighbor_attention"} <= subjects.keys()
    assert {"decoder JPEG", "decoder DICOM JPEG 2000", "tensorboard", "triton"} <= subjects.keys()
    assert subjects["torch"].text == importlib.metadata.version("torch")
    assert "PyTorch" in subjects["kernel space_aware_memory"].text


def test_what_is_missing_or_old_is_named_with_its_remedy(monkeypatch):
    installed = {"torch": "2.9.1+cpu", "numpy": "1.26", "tensorboard": None, "triton": None}
    real = importlib.metadata.version

    def version(name):
        if name == "matplotlib":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name] if name in installed else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    subjects = by_subject(doctor.examine())
    assert (subjects["torch"].mark, subjects["torch"].remedy) == ("FAIL", "pip install --upgrade 'torch>=2.10'")
    assert subjects["torch"].text == "2.9.1+cpu, needs torch>=2.10"
    assert (subjects["matplotlib"].mark, subjects["matplotlib"].remedy) == ("FAIL", "pip install 'matplotlib>=3.8'")
    assert subjects["numpy"].mark == "ok"
    assert subjects["tensorboard"].mark == "note" and "simsid[tensorboard]" in subjects["tensorboard"].remedy
    for finding in subjects.values():
        assert finding.mark == "ok" or finding.remedy or finding.subject.startswith("kernel"), finding


def test_triton_that_leaves_out_fences_is_a_note(monkeypatch):
    monkeypatch.setattr("simsid.kernels.backend.LEAVES_OUT_FENCES", True)
    finding = by_subject(doctor.examine())["triton"]
    assert finding.mark == "note" and "without pipelining" in finding.text and "--upgrade torch" in finding.remedy


def test_a_torch_that_does_not_load_is_reported(monkeypatch):
    monkeypatch.setattr(doctor, "torch", None)
    monkeypatch.setattr(doctor, "TORCH_ERROR", "libcudart.so.13: cannot open shared object file", raising=False)
    failed = [finding for finding in doctor.examine() if finding.mark == "FAIL"]
    assert len(failed) == 1 and "libcudart" in failed[0].text and failed[0].remedy.startswith("pip install")


def test_the_command_prints_and_counts(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and re.search(r"^ok +torch +\d", printed, re.M)
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["no-such-package>=1.0"])
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    assert stop.value.code == 1
    assert re.search(
        r"^FAIL no-such-package .*\n +-> pip install 'no-such-package>=1.0'$", capsys.readouterr().out, re.M
    )

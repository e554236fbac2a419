"""What an installation has, what it lacks, and the command that fixes each gap."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from typing import Any, Literal

from packaging.requirements import Requirement

from simsid import __version__

torch: Any
try:
    import torch
except ImportError as error:
    # Exactly when PyTorch cannot be loaded, this examination is needed.
    torch, TORCH_ERROR = None, str(error)

TRITON = "pip install triton"
EXTRA = "pip install 'simsid[dicom]'"


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    mark: Literal["ok", "note", "FAIL"]
    subject: str
    text: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Examine versions, processor, GPU, kernels and decoders."""
    findings = [_python(), *_packages()]
    if torch is None:
        remedy = "pip install --force-reinstall torch"
        findings.append(Finding("FAIL", "torch", f"cannot be loaded: {TORCH_ERROR}", remedy))
    else:
        findings += [_processor(), _precision(), *_gpu(), *_kernels()]
    return [*findings, *_decoders(), _tensorboard()]


def _python() -> Finding:
    where = f"{platform.system()} {platform.machine()}"
    return Finding("ok", "python", f"{platform.python_version()} on {where}; simsid {__version__}")


def required() -> list[Requirement]:
    """Return what the installed simsid requires, without the extras; nothing where it is not installed."""
    try:
        found = importlib.metadata.requires("simsid") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    requirements = [Requirement(text) for text in found]
    # With an empty extra, the markers of extras are false.
    return [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]


def _packages() -> list[Finding]:
    requirements = required()
    if not requirements:
        text = "runs from a checkout that is not installed, so its requirements are unknown"
        return [Finding("note", "simsid", text, "pip install -c constraints.txt -e .")]
    # Without Triton all runs on PyTorch; `_kernels` says so.
    return [_package(requirement) for requirement in requirements if requirement.name != "triton"]


def _package(requirement: Requirement) -> Finding:
    name, needs = requirement.name, f"{requirement.name}{requirement.specifier}"
    version = _version(name)
    if not version:
        return Finding("FAIL", name, f"missing, needs {needs}", f"pip install '{needs}'")
    # Builds such as 2.10.0+cpu and pre-releases count as their version.
    if not requirement.specifier.contains(version.split("+")[0], prereleases=True):
        return Finding("FAIL", name, f"{version}, needs {needs}", f"pip install --upgrade '{needs}'")
    return Finding("ok", name, version)


def _processor() -> Finding:
    return Finding("ok", "cpu", f"{os.cpu_count()} cores, threads that PyTorch uses: {torch.get_num_threads()}")


def _precision() -> Finding:
    from simsid.precision import INSTRUCTIONS, bfloat16_instructions, choose_precision, measured_speedup

    found = bfloat16_instructions()
    why = f"the processor has {', '.join(found)}" if found else f"the processor has none of {', '.join(INSTRUCTIONS)}"
    text = f"{choose_precision('auto', 'cpu')} where --precision auto trains on this CPU: {why}"
    return Finding(
        "ok", "precision", f"{text}; a 3x3 convolution is {measured_speedup():.1f} times as fast in bfloat16"
    )


def _gpu() -> list[Finding]:
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [
            Finding("ok", f"gpu {i}", f"{device.name}, compute capability {device.major}.{device.minor}")
            for i, device in enumerate(devices)
        ]
    if torch.version.cuda is None:
        text = "none used: this PyTorch is built for the CPU only"
        return [Finding("note", "gpu", text, "on a machine with an NVIDIA GPU: pip install --force-reinstall torch")]
    return [
        Finding("note", "gpu", f"none found by PyTorch (built for CUDA {torch.version.cuda})", "check with: nvidia-smi")
    ]


def _kernels() -> list[Finding]:
    import simsid.kernels as kernels
    from simsid.kernels.backend import LEAVES_OUT_FENCES, choose_backend

    choice = choose_backend("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    fused = choice.backend == "triton"
    runs = "Triton, on CUDA tensors" if fused else f"PyTorch: {choice.reason}"
    findings = [Finding("ok" if fused else "note", f"kernel {name}", runs) for name in kernels.__all__]
    version = _version("triton")
    text = version or "missing; only fused kernels on an NVIDIA GPU use it"
    linux = platform.system() == "Linux"
    if LEAVES_OUT_FENCES:
        text += "; it leaves out a fence: 16-bit and TF32 memory kernels run without pipelining on sm_90 and later"
        return [*findings, Finding("note", "triton", text, "pip install --upgrade torch triton")]
    return [*findings, Finding("ok" if version else "note", "triton", text, "" if version or not linux else TRITON)]


def _decoders() -> list[Finding]:
    try:
        from PIL import features
    except ImportError as error:
        return [Finding("FAIL", "pillow", f"cannot be loaded: {error}", "pip install --force-reinstall pillow")]
    findings = [
        Finding("ok", f"decoder {name}", f"Pillow {features.version(key) or ''}".strip())
        if features.check(key)
        else Finding("FAIL", f"decoder {name}", "Pillow was built without it", "pip install --force-reinstall pillow")
        for name, key in (("JPEG", "jpg"), ("PNG", "zlib"), ("TIFF", "libtiff"))
    ]
    return findings + _dicom_decoders()


def _dicom_decoders() -> list[Finding]:
    try:
        from pydicom import uid
        from pydicom.pixels import get_decoder
    except ImportError as error:
        return [Finding("FAIL", "pydicom", f"cannot be loaded: {error}", "pip install --force-reinstall pydicom")]
    syntaxes = {
        "JPEG": (uid.JPEGBaseline8Bit, EXTRA),
        "JPEG 2000": (uid.JPEG2000, EXTRA),
        "JPEG-LS": (uid.JPEGLSLossless, EXTRA),
        "RLE": (uid.RLELossless, EXTRA),
        "JPEG lossless": (uid.JPEGLosslessSV1, EXTRA),
    }
    return [
        Finding("ok", f"decoder DICOM {name}", "pydicom has one")
        if get_decoder(syntax).is_available
        else Finding("note", f"decoder DICOM {name}", "missing; such DICOM files are rejected with this reason", remedy)
        for name, (syntax, remedy) in syntaxes.items()
    ]


def _tensorboard() -> Finding:
    version = _version("tensorboard")
    if version:
        return Finding("ok", "tensorboard", version)
    return Finding(
        "note", "tensorboard", "missing; training writes metrics.jsonl without it", "pip install 'simsid[tensorboard]'"
    )


def _version(name: str) -> str:
    """Return an installed package's version, or an empty string."""
    try:
        return importlib.metadata.version(name) or ""
    except importlib.metadata.PackageNotFoundError:
        return ""

"""simsid: anomaly detection in chest radiographs without labels (SimSID, arXiv 2403.08689; SQUID, arXiv 2111.13495)."""

import importlib
import pathlib

__version__ = "0.1.0"

# In a source checkout kernels/ lies beside this folder, not in it; let `simsid.kernels` be found there too.
_here = pathlib.Path(__file__).parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels" / "space_aware_memory").is_dir():
    __path__.append(str(_here.parent))

_EXPORTS = {
    "Config": "simsid.config",
    "Model": "simsid.models.model",
    "Reconstruction": "simsid.models.model",
    "Trainer": "simsid.training.trainer",
    "TrainingConfig": "simsid.config",
    "History": "simsid.training.trainer",
}
_MODULES = ("data", "kernels")

__all__ = [*_EXPORTS, *_MODULES]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that `import simsid` stays light."""
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"simsid.{name}")
    raise AttributeError(f"module 'simsid' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

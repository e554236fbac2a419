"""simsid: anomaly detection in chest radiographs without labels (SimSID, arXiv 2403.08689; SQUID, arXiv 2111.13495)."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import pathlib
import sys

__version__ = "0.1.0"


class _CheckoutKernels(importlib.abc.MetaPathFinder):
    """Finds `simsid.kernels` in a source checkout that is not installed, where kernels/ lies beside this folder."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:  # noqa: ARG004
        """Return the spec of `simsid.kernels`, and of nothing else."""
        folder = pathlib.Path(__file__).parents[1] / "kernels"
        if name != "simsid.kernels" or not (folder / "memory" / "op.py").is_file():
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


# First in the list: another checkout may be installed, whose kernels must not be mixed with this one's modules.
sys.meta_path.insert(0, _CheckoutKernels)

_EXPORTS = {
    "Config": "simsid.config",
    "Model": "simsid.models.model",
    "Reconstruction": "simsid.models.model",
    "AnomalyModel": "simsid.models.base",
    "Detector": "simsid.detector",
    "FeatureMemory": "simsid.models.feature_memory",
    "FeatureConfig": "simsid.models.feature_config",
    "freeze": "simsid.models.inference",
    "load": "simsid.models.loading",
    "SimsidError": "simsid.errors",
    "Trainer": "simsid.training.trainer",
    "TrainingConfig": "simsid.config",
    "History": "simsid.training.trainer",
}
_MODULES = ("data", "kernels", "models", "report", "scoring", "training")

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

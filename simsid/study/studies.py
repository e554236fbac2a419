"""The table of studies: what each compares, and what the papers report of it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from simsid.config import ABLATIONS
from simsid.models.presets import PRESETS

Values = Mapping[str, object]
"""Fields of a configuration, by name."""


@dataclass(frozen=True)
class Cell:
    """One row of a study's table: a model, and how it is trained. It becomes one run folder for each seed."""

    label: str
    """Its name in the table and in the figure."""
    preset: str = "simsid"
    """A name of `simsid.models.presets.PRESETS`."""
    changes: Values = field(default_factory=dict)
    """Fields of the model's configuration that differ from the preset."""
    training: Values = field(default_factory=dict)
    """Fields of `TrainingConfig` that differ from the other cells."""
    normal_share: float = 1.0
    """Fraction of the training images that are normal; the others are abnormal, and their labels are not used."""
    x: float | None = None
    """Position on the figure's axis; None draws a bar."""
    paper: float | None = None
    """AUC that the study's source reports for ZhangLab's official test set, 0..1; None where it is not known here."""

    @property
    def folder(self) -> str:
        """The name of its folder: the label, with `_` for what is not a letter or a digit."""
        return re.sub(r"[^A-Za-z0-9]+", "_", self.label).strip("_")


@dataclass(frozen=True)
class Study:
    """A table of cells on the same images."""

    title: str
    """What is compared, and in which table or figure of the papers."""
    cells: tuple[Cell, ...]
    reference: str | None = "simsid"
    """What the others are tested against: a cell's label, or the preset whose cell has no changes; None: every preset
    has such a cell of its own."""
    axis: str = ""
    """Label of the figure's horizontal axis; empty where the cells have no order."""
    measures: Literal["auc", "seconds"] = "auc"
    """What the figure shows."""
    reconstructions: bool = False
    """Also draw one image of each kind with every model's reconstruction (SQUID, figure 6)."""


def _taken_away(preset: str, names: Mapping[str, Values], paper: float | None = None) -> tuple[Cell, ...]:
    """Return the full model and one cell for each part that is taken away or exchanged."""
    return (Cell("full model", preset, paper=paper), *(Cell(name, preset, values) for name, values in names.items()))


def _parts(*left_out: str) -> dict[str, Values]:
    return {name: changes for name, (_, changes) in ABLATIONS.items() if name not in left_out}


def _mixed(presets: tuple[str, ...], shares: tuple[float, ...]) -> tuple[Cell, ...]:
    return tuple(
        Cell(f"{name} {round(100 * share)} %", name, normal_share=share, x=100 * share)
        for name in presets
        for share in shares
    )


SIMSID_AUC, SQUID_AUC = 0.911, 0.876
"""ZhangLab's official test set, 200 epochs on a GPU. Source: SimSID (arXiv 2403.08689), table I; SQUID (arXiv
2111.13495), table 1."""

FEATURE_MODELS = ("features", "feature_knn", "location_knn", "padim", "patchcore")

STUDIES: dict[str, Study] = {
    "components": Study(
        "parts of SimSID taken away or exchanged (SimSID, table II)",
        _taken_away("simsid", _parts("no_masked_shortcut"), SIMSID_AUC),
    ),
    "squid_components": Study(
        "parts of SQUID taken away or exchanged (SQUID, table 2)",
        _taken_away("squid", {**_parts("memory_queue"), "memory_matrix": {"memory": "matrix"}}, SQUID_AUC),
        reference="squid",
    ),
    "patches": Study(
        "patches along one side of the image, P (SimSID, figure 8)",
        tuple(Cell(f"P = {n}", changes={"patches": n}, x=n) for n in (1, 2, 3, 4, 6, 8)),
        axis="patches along one side, P",
    ),
    "topk": Study(
        "items that a look-up keeps, k (SimSID, figure 8)",
        tuple(Cell(f"k = {n}", changes={"topk": n}, x=n) for n in range(1, 11)),
        axis="items kept, k",
    ),
    "items": Study(
        "items of a location's memory, N (SimSID, figure 8)",
        tuple(
            Cell(f"N = {n}", changes={"items": n, "decoder_items": n}, x=n) for n in (50, 100, 200, 300, 400, 500, 1000)
        ),
        axis="items of a location, N",
    ),
    "mixed": Study(
        "abnormal images among the training images, which the model takes as normal (SimSID, figure 9)",
        _mixed(("simsid",), (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)),
        axis="normal images among the training images, %",
    ),
    "contamination": Study(
        "the same for the models on features: 0, 5, 10 and 20 % abnormal training images",
        _mixed(FEATURE_MODELS, (1.0, 0.95, 0.9, 0.8)),
        reference=None,
        axis="normal images among the training images, %",
    ),
    "methods": Study(
        "every model and baseline on the same images (SimSID, table I)",
        tuple(
            Cell(name, name, paper={"simsid": SIMSID_AUC, "squid": SQUID_AUC}.get(name))
            for name in PRESETS
            if name != "digit_anatomy"  # SimSID at another size
        ),
        reconstructions=True,
    ),
    "decay": Study(
        "how the generator's weights decay: with the gradient, likewise but not the memory items, or apart from it",
        (
            Cell("coupled", training={"generator_weight_decay": 1e-5}),
            Cell("except_items", training={"generator_weight_decay": 1e-5, "decay": "except_items"}),
            Cell("decoupled", training={"generator_weight_decay": 1e-2, "decay": "decoupled"}),
        ),
        reference="coupled",
    ),
    "speed": Study(
        "seconds of an epoch and of a pass, SimSID against SQUID",
        (Cell("simsid"), Cell("squid", "squid")),
        measures="seconds",
    ),
}
"""Every study by its name on the command line."""

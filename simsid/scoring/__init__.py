"""Scoring: single files and streams of them, whole archives, and the pictures that reports show."""

from simsid.scoring.stream import (
    Score,
    evaluate,
    examples,
    examples_of_files,
    preparation,
    require_labels,
    score_files,
    threshold,
    typical_places,
)

__all__ = [
    "Score",
    "evaluate",
    "examples",
    "examples_of_files",
    "preparation",
    "require_labels",
    "score_files",
    "threshold",
    "typical_places",
]

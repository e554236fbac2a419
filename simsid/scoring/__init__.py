"""Scoring: streams of files, whole archives, heat maps, and the check of scores against the calibration."""

from simsid.scoring.archive import score_archive
from simsid.scoring.heat_maps import Explained, explain_files
from simsid.scoring.shift import Shift, find_shift
from simsid.scoring.stream import Score, columns, row, score_files
from simsid.scoring.summary import Summary

__all__ = [
    "Explained",
    "Score",
    "Shift",
    "Summary",
    "columns",
    "explain_files",
    "find_shift",
    "row",
    "score_archive",
    "score_files",
]

"""Scoring: streams of files, whole archives, and the check of scores against the calibration."""

from simsid.scoring.archive import score_archive
from simsid.scoring.shift import Shift, find_shift
from simsid.scoring.stream import Score, columns, row, score_files
from simsid.scoring.summary import Summary

__all__ = ["Score", "Shift", "Summary", "columns", "find_shift", "row", "score_archive", "score_files"]

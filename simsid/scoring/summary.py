"""What a call of `score_archive` returns."""

from dataclasses import dataclass, field
from typing import Literal

from simsid.scoring.shift import Shift
from simsid.scoring.stream import Score


@dataclass(frozen=True)
class Summary:
    """How far a call of `score_archive` came.

    Args:
        state: `"merged"`: `scores.csv` is written. `"waiting"`: this rank has finished, `missing` ranks have not.
            `"already merged"`: another rank had finished everything. `"interrupted"`: Ctrl-C; the next call resumes.
        done: files that this rank has scored.
        resumed: those of them that were found done.
        missing: ranks still running.
        scored, flagged, failed: counts over all ranks, once merged.
        for_processing: of the scored, images stored FOR PROCESSING, whose scores mean little.
        top: the highest scores, ascending, with their images, once merged.
        shift: set where the scores do not resemble the calibration's.
    """

    state: Literal["merged", "waiting", "already merged", "interrupted"]
    done: int = 0
    resumed: int = 0
    missing: tuple[int, ...] = ()
    scored: int = 0
    flagged: int = 0
    failed: int = 0
    for_processing: int = 0
    top: list[Score] = field(default_factory=list)
    shift: Shift | None = None

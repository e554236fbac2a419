"""Studies: the papers' tables and figures, trained, evaluated and laid out beside what the papers report."""

from simsid.study.images import StudyImages
from simsid.study.plan import Plan
from simsid.study.run import StudyRun
from simsid.study.studies import STUDIES, Cell, Study

__all__ = ["STUDIES", "Cell", "Plan", "Study", "StudyImages", "StudyRun"]

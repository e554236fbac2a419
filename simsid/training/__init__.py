"""Training: the epoch loop, one iteration of it, the state of a run and its folder."""

from simsid.training.run_folder import RunFolder
from simsid.training.state import History
from simsid.training.step import TrainingStep
from simsid.training.trainer import Trainer

__all__ = ["History", "RunFolder", "Trainer", "TrainingStep"]

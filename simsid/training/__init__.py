"""Training: the epoch loop, one iteration of it, and the folder of a run."""

from simsid.training.trainer import History, Trainer

__all__ = ["History", "Trainer"]

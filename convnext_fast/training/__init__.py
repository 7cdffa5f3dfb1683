"""Training: from labelled pictures to an exported model, resumable to the same numbers and under ``torchrun``."""

from .data import ImageSet, load_data
from .loop import Reporter, Score, Trainer, evaluate
from .options import TrainingOptions

__all__ = ["ImageSet", "Reporter", "Score", "Trainer", "TrainingOptions", "evaluate", "load_data"]

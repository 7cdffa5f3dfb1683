"""Training: from labelled images to an exported model, resumable to the same numbers, and under ``torchrun``."""

from .data import load_data
from .evaluation import Reporter, Score, evaluate
from .image_set import ImageSet
from .loop import Trainer
from .options import TrainingOptions

__all__ = ["ImageSet", "Reporter", "Score", "Trainer", "TrainingOptions", "evaluate", "load_data"]

"""Optimizer, schedule, the step and the loop that trains; `train` runs a whole training."""

from signal_reid.methods.losses import soft_margin_triplet
from signal_reid.training.loop import TrainingResult, train
from signal_reid.training.optimizer import make_optimizer
from signal_reid.training.schedule import rate_at, set_rates
from signal_reid.training.step import total_loss

__all__ = [
    "TrainingResult",
    "make_optimizer",
    "rate_at",
    "set_rates",
    "soft_margin_triplet",
    "total_loss",
    "train",
]

"""Losses, optimizer, schedule and the training loop."""

from signal_reid.methods.losses import loss_parts, soft_margin_triplet, total_loss
from signal_reid.training.optimizer import make_optimizer
from signal_reid.training.schedule import rate_at, set_rates

__all__ = ["loss_parts", "make_optimizer", "rate_at", "set_rates", "soft_margin_triplet", "total_loss"]

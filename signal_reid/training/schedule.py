"""The learning rate of each epoch, as the authors' schedules have it."""

import math
from bisect import bisect_right

import torch

from signal_reid.config import ScheduleConfig

NOISE_SEED = 42
NOISE_LIMIT = 0.67
WARMUP_FACTOR = 0.01


def rate_at(epoch: int, rate: float, global_rate: float, config: ScheduleConfig) -> float:
    """Learning rate of a parameter group in an epoch.

    Args:
        epoch: counted from 1.
        rate: the group's unscheduled rate.
        global_rate: the configuration's base rate: warm-up starts every group from a tenth of it, so a slow group
            warms *down*, and the cosine ends at a thousandth of it.
        config: the schedule.

    Source: the authors' training code, measured.
    """
    return _multistep(epoch, rate, config) if config.name == "multistep" else _cosine(epoch, rate, global_rate, config)


def set_rates(optimizer: torch.optim.Optimizer, epoch: int, global_rate: float, config: ScheduleConfig) -> None:
    """Set every group's learning rate for the epoch that begins."""
    for group in optimizer.param_groups:
        group["lr"] = rate_at(epoch, group["base_rate"], global_rate, config)


def _cosine(epoch: int, rate: float, global_rate: float, config: ScheduleConfig) -> float:
    floor = 0.001 * global_rate
    if epoch >= config.epochs:
        return floor
    if epoch < config.warmup_epochs:
        start = 0.1 * global_rate
        value = start + epoch * (rate - start) / config.warmup_epochs
    else:
        value = floor + (rate - floor) * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
    return value * (1 + _noise(epoch)) if config.noise else value


def _noise(epoch: int) -> float:
    """The first standard normal draw within the limit, of a generator seeded by the epoch."""
    generator = torch.Generator().manual_seed(NOISE_SEED + epoch)
    while True:
        draw = torch.randn(1, generator=generator).item()
        if abs(draw) < NOISE_LIMIT:
            return draw


def _multistep(epoch: int, rate: float, config: ScheduleConfig) -> float:
    warmup = 1.0
    if epoch < config.warmup_epochs:
        share = epoch / config.warmup_epochs
        warmup = WARMUP_FACTOR * (1 - share) + share
    return rate * warmup * config.gamma ** bisect_right(config.milestones, epoch)

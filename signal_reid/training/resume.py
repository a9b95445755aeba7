"""What a run needs to continue as if it had never stopped."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import nn

from signal_reid.config import Config
from signal_reid.runtime.errors import InputError
from signal_reid.training.run_directory import RunDirectory
from signal_reid.training.training_state import (
    load_training_state,
    restore_rng,
    restore_training_state,
    save_training_state,
)


@dataclass
class Progress:
    """How far a run is; epochs and steps count from 1, and are 0 before the first."""

    epoch: int = 0
    step: int = 0
    best_mAP: float = -1.0  # noqa: N815 - the field's name
    best_epoch: int = 0


def save(
    run: RunDirectory,
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    progress: Progress,
) -> None:
    """Replace the run's checkpoint, whole or not at all."""
    save_training_state(
        run.checkpoint,
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        progress=asdict(progress),
        config=config,
    )


def restore(
    run: RunDirectory,
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Progress:
    """Load the run's checkpoint into the model, the optimizer and the scaler, and drop metrics of unfinished epochs.

    Raises:
        ValueError: the run is finished, its checkpoint is damaged, or a setting differs that would change the losses.
    """
    state = load_training_state(run.checkpoint)
    progress = Progress(**state["progress"])
    if progress.epoch >= config.schedule.epochs:
        raise InputError(f"{run.path} is finished: epoch {progress.epoch} of {config.schedule.epochs}")
    restore_training_state(state, model=model, optimizer=optimizer, scaler=scaler)
    restore_rng(state["rng"])
    run.resume(config, progress.epoch)
    return progress

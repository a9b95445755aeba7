"""A trained model from its weights, sized as they need it, with the data set that it is used on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from signal_reid import checkpoints
from signal_reid.checkpoints import LoadReport
from signal_reid.config import Config, ConfigError
from signal_reid.data import Dataset, open_dataset
from signal_reid.methods import build_model
from signal_reid.methods.base import Method
from signal_reid.runtime.device import choose_device
from signal_reid.runtime.distributed import ALONE, Processes


@dataclass(frozen=True)
class Trained:
    """A model with its weights, on a device, and what it is used on."""

    model: Method
    dataset: Dataset
    device: torch.device
    report: LoadReport
    """What the weights gave the model."""


def load_trained(config: Config, weights: Path, processes: Processes = ALONE) -> Trained:
    """Build the model that some weights need, and load them.

    Args:
        config: `model`, `data` and `training.device` are used.
        weights: a checkpoint of any supported naming.
        processes: that share the work; each gets a device of its own.

    Raises:
        FileNotFoundError: no weights, or no data set.
        ConfigError: the data set has more cameras than the weights know.
        CheckpointError: the weights do not fit the configuration.
        DataError, ValueError: see `open_dataset` and `choose_device`.
    """
    device = choose_device(config.training.device, processes)
    dataset = open_dataset(config.data.dataset, config.data.root)
    trained_on = checkpoints.describe(weights)
    identities = trained_on.num_identities or dataset.num_train_identities
    cameras = trained_on.num_cameras or dataset.num_cameras
    if config.model.backbone.camera_embedding and dataset.num_cameras > cameras:
        raise ConfigError(
            f"{weights} knows {cameras} cameras, the data set has {dataset.num_cameras}; "
            "model.backbone.camera_embedding=false evaluates without camera embedding"
        )
    torch.manual_seed(config.training.seed)  # weights of a backbone alone leave the rest as initialised
    model = build_model(config, identities, cameras)
    report = checkpoints.load(model, weights)
    return Trained(model.to(device), dataset, device, report)

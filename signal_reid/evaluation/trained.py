"""A trained model from its weights, sized as they need it, with its configuration and the data set to use it on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from signal_reid import checkpoints
from signal_reid.checkpoints import CheckpointError, LoadReport
from signal_reid.config import Config, ConfigError, load_config
from signal_reid.config.yaml_text import YamlError, read_yaml
from signal_reid.data import Dataset, open_configured
from signal_reid.methods.base import Method
from signal_reid.methods.registry import build_model
from signal_reid.runtime.device import choose_device
from signal_reid.runtime.distributed import ALONE, Processes

_WITHOUT_WEIGHTS = 2**26
"""Parameters that a model may have beyond those of its file: 256 MiB of them."""
_MAKERS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)


@dataclass(frozen=True)
class Trained:
    """A model with its weights, on a device, and what it is used on."""

    config: Config
    model: Method
    dataset: Dataset
    device: torch.device
    report: LoadReport
    """What the weights gave the model."""


def load_trained(
    weights: Path, config: str | Path | None = None, overrides: Sequence[str] = (), processes: Processes = ALONE
) -> Trained:
    """Build the model that some weights need, and load them.

    Args:
        weights: a checkpoint of any supported naming.
        config: a published name or a file; none: the configuration that the weights carry, else `config.yml` beside
            them.
        overrides: `key=value` settings applied on top.
        processes: that share the work; each gets a device of its own.

    Raises:
        FileNotFoundError: no weights, or no data set.
        ConfigError: there is no configuration, or the data set has more cameras than the weights know.
        CheckpointError: the weights do not fit the configuration.
        DataError, InputError: see `open_configured` and `choose_device`.
    """
    asked = None if config is None else load_config(config, overrides)  # its mistakes are found before much is read
    trained_on = checkpoints.describe(weights)
    loaded = asked or _own_configuration(weights, trained_on.config, overrides)
    device = choose_device(loaded.training.device, processes)
    dataset = open_configured(loaded)
    identities = trained_on.num_identities or dataset.num_train_identities
    known = trained_on.num_cameras  # 0: trained without cameras, so they are not told; none: a backbone's weights
    cameras = dataset.num_cameras if trained_on.num_identities is None else known
    if loaded.model.backbone.camera_embedding and dataset.num_cameras > cameras > 0:
        raise ConfigError(
            f"{weights} knows {cameras} cameras, the data set has {dataset.num_cameras}; "
            "model.backbone.camera_embedding=false evaluates without camera embedding"
        )
    torch.manual_seed(loaded.training.seed)  # weights of a backbone alone leave the rest as initialised
    model, report = _loaded(loaded, weights, identities, cameras, trained_on.elements)
    return Trained(loaded, model.to(device), dataset, device, report)


def load_beside(config: Config, model: Method, dataset: Dataset, weights: Path | None = None) -> tuple[Method, str]:
    """Another model of the same configuration, to be compared with a trained one.

    Args:
        config: of both.
        model: the trained one; its sizes and its device are used.
        dataset: that it is used on.
        weights: a checkpoint; none: the model as its training began, with the backbone's weights that the configuration
            names, the rest as `training.seed` initialises it.

    Returns:
        The model on the same device, and what it was given, in a few lines.

    Raises:
        FileNotFoundError: no such weights.
        CheckpointError: they do not fit the configuration.
    """
    identities, device, known = model.num_identities, next(model.parameters()).device, model.backbone.camera_embedding
    cameras = dataset.num_cameras if known is None else len(known)
    torch.manual_seed(config.training.seed)
    if weights is not None:
        other, report = _loaded(config, weights, identities, cameras, checkpoints.describe(weights).elements)
        return other.to(device), report.summary()
    other, source = build_model(config, identities, cameras), config.model.backbone.weights
    if source is None:
        return other.to(device), f"as training began: random weights of training.seed={config.training.seed}"
    return other.to(device), checkpoints.load_backbone(other, source).summary()


def load_model(
    weights: Path, config: str | Path | None = None, overrides: Sequence[str] = ()
) -> tuple[Config, Method, LoadReport]:
    """Build the model that some weights need, on the CPU and without a data set; see `load_trained`.

    Raises:
        CheckpointError: as `load_trained`, or the weights are those of a backbone alone.
    """
    trained_on = checkpoints.describe(weights)
    if trained_on.num_identities is None:
        raise CheckpointError(f"{weights}: weights of a backbone alone ({trained_on.format} naming)")
    loaded = load_config(config, overrides) if config else _own_configuration(weights, trained_on.config, overrides)
    sizes = trained_on.num_identities, trained_on.num_cameras, trained_on.elements
    return loaded, *_loaded(loaded, weights, *sizes)


class _Within(TorchFunctionMode):
    """Refuses a model that a file is far too small for, while it is built and before memory is taken for it.

    The configuration that a file carries may ask for any size. Heads and a camera embedding may be missing from a file.
    """

    def __init__(self, weights: Path, elements: int) -> None:
        super().__init__()
        self.most = 4 * elements + _WITHOUT_WEIGHTS
        self.counted = 0
        self.refusal = f"{weights}: holds {elements} numbers, and the configuration asks for a model of more"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _MAKERS:
            sizes = args[0] if args and isinstance(args[0], (tuple, list)) else args
            self.check(math.prod(size for size in sizes if isinstance(size, int)))
        return func(*args, **(kwargs or {}))

    def count(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        self.counted += 0 if parameter is None else parameter.numel()
        self.check(self.counted)

    def check(self, elements: int) -> None:
        if elements > self.most:
            raise CheckpointError(f"{self.refusal} than {self.most}")


def _built(config: Config, weights: Path, identities: int, cameras: int, elements: int) -> Method:
    with _Within(weights, elements) as within:
        hook = register_module_parameter_registration_hook(within.count)
        try:
            return build_model(config, identities, cameras)
        finally:
            hook.remove()


def _loaded(config: Config, weights: Path, identities: int, cameras: int, elements: int) -> tuple[Method, LoadReport]:
    if identities < 2:
        raise CheckpointError(f"{weights}: trained on {identities} identity, a model needs at least 2")
    model = _built(config, weights, identities, cameras, elements)
    return model, checkpoints.load(model, weights)


def _own_configuration(weights: Path, carried: str | None, overrides: Sequence[str]) -> Config:
    if carried is not None:
        return _carried_configuration(_mapping(carried, weights), weights, overrides)
    directory = weights if weights.is_dir() else weights.parent
    beside = directory / "config.yml"
    if not beside.is_file():
        raise ConfigError(
            f"give --config NAME_OR_FILE: {weights} carries no configuration, and no config.yml is beside it"
        )
    return load_config(beside, overrides)


def _carried_configuration(values: dict[str, object], weights: Path, overrides: Sequence[str]) -> Config:
    try:
        return load_config(values, overrides)
    except ConfigError:
        try:
            load_config(values)
        except ConfigError as error:  # nobody wrote it on the command line
            raise CheckpointError(f"{weights}: the configuration that it carries: {error}") from None
        raise


def _mapping(carried: str, weights: Path) -> dict[str, object]:
    try:
        values = read_yaml(carried)
    except YamlError:
        values = None
    if not isinstance(values, dict):
        raise CheckpointError(f"{weights}: the configuration that it carries is damaged; give --config NAME_OR_FILE")
    return values

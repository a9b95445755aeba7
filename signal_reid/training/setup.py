"""Everything that a training needs before its first step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from torch import nn

from signal_reid import checkpoints
from signal_reid.config import Config
from signal_reid.data import Augmentation, Dataset, TrainLoader, make_train_loader, open_configured
from signal_reid.data.depth import with_measured_ranges
from signal_reid.evaluation.evaluator import Evaluator
from signal_reid.methods.base import Method
from signal_reid.methods.registry import build_model
from signal_reid.runtime.console import progress_bar
from signal_reid.runtime.device import Precision, choose_device, choose_precision
from signal_reid.training.optimizer import make_optimizer
from signal_reid.training.run_directory import RunDirectory
from signal_reid.training.step import TrainingStep, wants_compile
from signal_reid.training.throughput import peak_flops, training_flops
from signal_reid.training.training_state import Position, Trainee, restore


@dataclass(frozen=True)
class Training:
    """What the loop works with."""

    config: Config
    console: Console
    run: RunDirectory
    device: torch.device
    precision: Precision
    dataset: Dataset
    loader: TrainLoader
    augmentation: Augmentation
    evaluator: Evaluator
    model: Method
    trainee: Trainee
    step: TrainingStep
    position: Position
    flops: float
    """Operations of one sample's forward and backward."""
    peak: float
    """Operations per second that the device could reach."""


def prepare(config: Config, resume: bool, console: Console) -> Training:
    """Check the settings, open the data, build the model, and begin the run directory or continue it.

    Settings that contradict each other are refused before anything is read, and nothing is written before everything
    has been read. See `train` for the arguments and the errors.
    """
    device = choose_device(config.training.device)
    precision = choose_precision(config.training.precision, device)
    run = RunDirectory(config.output)
    run.check(resume)
    wants_compile(config, device)

    with progress_bar("measuring images", console) as show:
        config = with_measured_ranges(config, show)
    dataset = open_configured(config)
    with progress_bar("decoding images", console) as show:
        loader = make_train_loader(config, dataset, device, progress=show)
        evaluator = Evaluator(config, dataset, device, progress=show)

    torch.manual_seed(config.training.seed)
    model = build_model(config, dataset.num_train_identities, dataset.num_cameras).to(device)
    trainee = Trainee(model, make_optimizer(model, config.optimizer), precision.scaler())
    position = _begin(config, run, trainee, resume, console)
    model.backbone.checkpointing = config.training.gradient_checkpointing
    torch.compiler.reset()  # what an earlier training in this process compiled counts against dynamo's limit
    step = TrainingStep(model, config, precision, trainee.scaler, say=console.print)
    flops, (peak, peak_source) = training_flops(model), peak_flops(precision)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{config.data.dataset}: {len(dataset.train)} {dataset.unit} of {dataset.num_train_identities} identities from "
        f"{dataset.num_cameras or 'unknown'} cameras; {parameters / 1e6:.1f} M parameters, {flops / 1e9:.1f} GFLOP a "
        f"{dataset.unit[:-1]}; {precision.name} on {device}, MFU of {peak / 1e12:.2f} TFLOP/s "
        f"({peak_source})"
    )
    augmentation = Augmentation(config.data)
    parts = (config, console, run, device, precision, dataset, loader, augmentation, evaluator)
    return Training(*parts, model, trainee, step, position, flops, peak)


def _begin(config: Config, run: RunDirectory, trainee: Trainee, resume: bool, console: Console) -> Position:
    """Take up the run where its checkpoint left it, or start it with the backbone's weights."""
    if resume and run.checkpoint.exists():
        position = restore(run, config, trainee)
        console.print(f"continuing {run.path} after epoch {position.epoch}, step {position.step}")
        return position
    console.print(_load_weights(trainee.model, config.model.backbone.weights))
    run.start(config)
    return Position()


def _load_weights(model: nn.Module, weights: str | None) -> str:
    if weights is None:
        return "the backbone starts from random weights; model.backbone.weights= takes pre-trained ones"
    return checkpoints.load_backbone(model, weights).summary()

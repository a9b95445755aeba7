"""Everything that a training needs before its first step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from torch import nn

from signal_reid import checkpoints
from signal_reid.config import Config
from signal_reid.data import Augmentation, Dataset, TrainLoader, hold_out, make_train_loader, open_configured
from signal_reid.data.configured import with_named_modalities
from signal_reid.data.depth import with_measured_ranges
from signal_reid.evaluation.evaluator import Evaluator
from signal_reid.methods.base import Method
from signal_reid.methods.registry import build_model
from signal_reid.runtime.console import progress_bar
from signal_reid.runtime.device import Precision, choose_device, choose_precision
from signal_reid.runtime.distributed import ALONE, Processes
from signal_reid.training.optimizer import make_optimizer
from signal_reid.training.outlook import Outlook
from signal_reid.training.run_directory import RunDirectory
from signal_reid.training.sharing import check_shareable
from signal_reid.training.step import TrainingStep, wants_compile
from signal_reid.training.throughput import peak_flops, training_flops
from signal_reid.training.training_state import Position, Trainee, restore


@dataclass(frozen=True)
class Training:
    """What the loop works with."""

    config: Config
    processes: Processes
    console: Console
    run: RunDirectory
    device: torch.device
    precision: Precision
    dataset: Dataset
    loader: TrainLoader
    augmentation: Augmentation
    evaluator: Evaluator
    """Evaluates on the test set."""
    validator: Evaluator | None
    """Evaluates on the training identities held out to choose the best epoch on; none: it is chosen on the test set."""
    model: Method
    trainee: Trainee
    step: TrainingStep
    position: Position
    flops: float
    """Operations of one sample's forward and backward."""
    peak: float
    """Operations per second that the device could reach."""
    outlook: Outlook


def prepare(config: Config, resume: bool, console: Console, processes: Processes = ALONE) -> Training:
    """Check the settings, open the data, build the model, and begin the run directory or continue it.

    Settings that contradict each other are refused before anything is read, and nothing is written before everything
    has been read. Of several processes only process 0 looks at the run directory. See `train` for the arguments and the
    errors.
    """
    check_shareable(config, processes)
    device = choose_device(config.training.device, processes)
    precision = choose_precision(config.training.precision, device)
    run = RunDirectory(config.output)
    if processes.first:
        run.check(resume)
    wants_compile(config, device)

    with progress_bar("measuring images", console) as show:
        config = with_measured_ranges(config, show)
    dataset = open_configured(config)
    config = with_named_modalities(config, dataset)
    held: Dataset | None = None
    if config.training.validation:
        dataset, held = hold_out(dataset, config.training.validation, config.training.validation_seed)
    with progress_bar("decoding images", console) as show:
        loader = make_train_loader(config, dataset, device, progress=show, processes=processes)
        evaluator = Evaluator(config, dataset, device, show, processes)
        validator = Evaluator(_unpacked(config), held, device, show, processes) if held is not None else None

    torch.manual_seed(config.training.seed)
    model = build_model(config, dataset.num_train_identities, dataset.num_cameras).to(device)
    trainee = Trainee(model, make_optimizer(model, config.optimizer), precision.scaler())
    position = _begin(config, run, trainee, resume, console, processes)
    model.backbone.checkpointing = config.training.gradient_checkpointing
    torch.compiler.reset()  # what an earlier training in this process compiled counts against dynamo's limit
    step = TrainingStep(model, config, precision, trainee.scaler, say=console.print, processes=processes)
    flops, (peak, peak_source) = training_flops(model), peak_flops(precision)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{config.data.dataset}: {len(dataset.train)} {dataset.unit} of {dataset.num_train_identities} identities from "
        f"{dataset.num_cameras or 'unknown'} cameras; {parameters / 1e6:.1f} M parameters, {flops / 1e9:.1f} GFLOP for "
        f"each {dataset.unit[:-1]}; {precision.name} on {device}, MFU of {peak / 1e12:.2f} TFLOP/s "
        f"({peak_source})"
    )
    if (warning := slowness(precision)) is not None:
        console.print(warning)
    if processes.size > 1:
        console.print(_shares(config, processes))
    console.print(_chosen_on(held))
    augmentation = Augmentation(config.data)
    parts = (config, processes, console, run, device, precision, dataset, loader, augmentation, evaluator, validator)
    return Training(*parts, model, trainee, step, position, flops, peak, Outlook(config.schedule.epochs))


def slowness(precision: Precision) -> str | None:
    """What to say of a precision that the device computes far slower than another one; none where it does not."""
    if precision.name != "fp16" or precision.device.type != "cpu":
        return None
    return "a CPU takes many times as long in fp16 as in fp32; training.precision=fp32 or bf16 does without"


def _unpacked(config: Config) -> Config:
    """Without the packed file, which holds training images resized for training alone."""
    if config.data.cache != "packed":
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"cache": "none"})})


def _chosen_on(held: Dataset | None) -> str:
    if held is None:
        return (
            "the best epoch is chosen on the test set, as the published numbers do; "
            "training.validation=0.1 holds out training identities instead"
        )
    identities = len({sample.identity for sample in held.query})
    return (
        f"the best epoch is chosen on {len(held.query)} {held.unit} of {identities} held-out training identities; "
        "the test set is measured once, after training"
    )


def _begin(
    config: Config, run: RunDirectory, trainee: Trainee, resume: bool, console: Console, processes: Processes
) -> Position:
    """Take up the run where its checkpoint left it, or start it with the backbone's weights."""
    if resume and processes.from_first(run.checkpoint.exists if processes.first else None):
        return restore(run, config, trainee, console.print, processes)
    console.print(_load_weights(trainee.model, config.model.backbone.weights))
    if processes.first:
        run.start(config)
    return Position()


def _shares(config: Config, processes: Processes) -> str:
    """What each of several processes does."""
    batch, size = config.data.batch_size, processes.size
    seen = "every loss sees all of it"
    if config.training.gather == "local":
        seen = "every loss, batch statistic and hardest triplet sees one process's part (training.gather=local)"
    return f"{size} processes: data.batch_size={batch} in parts of {batch // size}, {seen}; process 0 writes"


def _load_weights(model: nn.Module, weights: str | None) -> str:
    if weights is None:
        return "the backbone starts from random weights; model.backbone.weights= takes pre-trained ones"
    return checkpoints.load_backbone(model, weights).summary()

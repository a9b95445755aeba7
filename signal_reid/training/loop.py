"""The training loop: reads top to bottom."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import Tensor

from signal_reid import checkpoints
from signal_reid.config import Config
from signal_reid.data import Dataset, augmentation_generator, prefetch
from signal_reid.evaluation.evaluator import Evaluation
from signal_reid.methods.base import Method
from signal_reid.runtime.console import make_console, progress_bar
from signal_reid.runtime.errors import InputError
from signal_reid.training.clock import StepClock
from signal_reid.training.meters import RunningMeans
from signal_reid.training.run_directory import MetricsLog, RunDirectory
from signal_reid.training.schedule import rate_at, set_rates
from signal_reid.training.setup import Training, prepare
from signal_reid.training.throughput import peak_memory, reset_peak_memory
from signal_reid.training.training_state import save


@dataclass(frozen=True)
class TrainingResult:
    """What a training leaves: the model with its last weights, the last evaluation, and the best epoch."""

    model: Method
    dataset: Dataset
    evaluation: Evaluation
    best_mAP: float  # noqa: N815 - the field's name
    best_epoch: int


def train(config: Config, *, resume: bool = False, console: Console | None = None) -> TrainingResult:
    """Train a model and write its run directory, `config.output`; `signal_reid.train` writes its report as well.

    Args:
        config: everything that the run depends on.
        resume: continue from the checkpoint in the run directory; on the CPU the losses are those of a run that was
            never interrupted, bit for bit.
        console: where lines and progress bars are shown; the standard error by default.

    Raises:
        FileExistsError: the run directory holds a run and `resume` is not set.
        FileNotFoundError: a missing dataset, weights file or run.
        InUseError: another process trains in the run directory.
        InputError: a dataset, checkpoint or setting that cannot be used, or a loss that is no longer finite.
    """
    console = console or make_console()
    with RunDirectory(config.output).owned(console.print):
        return run_epochs(prepare(config, resume, console))


def run_epochs(training: Training) -> TrainingResult:
    """Train from where the training stands to its last epoch."""
    config, run, position = training.config, training.run, training.position
    epochs = config.schedule.epochs
    with MetricsLog(run, position.step, training.console.print) as log:
        for epoch in range(position.epoch + 1, epochs + 1):
            train_epoch(training, epoch, log)
            position.epoch, last = epoch, epoch == epochs
            if last or epoch % config.evaluation.every == 0:
                evaluation = evaluate_epoch(training, epoch, log)
            if last:
                checkpoints.export(training.model, run.last, config=config)
            if last or epoch % config.training.checkpoint_every == 0:
                log.flush()
                save(run, config, training.trainee, position)
    return TrainingResult(training.model, training.dataset, evaluation, position.best_mAP, position.best_epoch)


def train_epoch(training: Training, epoch: int, log: MetricsLog) -> None:
    """Go through the training split once, and log and print what was measured."""
    config, console, device, trainee = training.config, training.console, training.device, training.trainee
    step, position, loader = training.step, training.position, training.loader
    loader.set_epoch(epoch)
    set_rates(trainee.optimizer, epoch, config.optimizer.base_rate, config.schedule)
    trainee.model.train()
    means, triplets, started = RunningMeans(), 0, time.perf_counter()
    reset_peak_memory(device)
    clock = StepClock(device)

    with progress_bar(f"epoch {epoch}/{config.schedule.epochs}", console) as show:
        for index, batch in enumerate(prefetch(loader, device)):
            generator = augmentation_generator(config.training.seed, epoch, index)
            images = training.augmentation.augment(batch.images, generator)
            clock.lap("data")

            trainee.optimizer.zero_grad(set_to_none=True)
            losses = step.forward(images, batch.cameras, batch.labels)
            clock.lap("forward")

            step.backward(losses["total"])
            clock.lap("backward")

            trainee.scaler.step(trainee.optimizer)
            trainee.scaler.update()
            clock.lap("optimizer")

            position.step += 1
            triplets += len(batch.labels)
            means.add(losses)
            show(index + 1, len(loader), _log_step(training, epoch, losses, log))

    mean_losses = means.means()  # waits for the device, so the time ends where the work does
    seconds = time.perf_counter() - started
    _log_epoch(training, epoch, mean_losses, triplets / seconds, seconds, clock, log)


def evaluate_epoch(training: Training, epoch: int, log: MetricsLog) -> Evaluation:
    """Evaluate the model as it is, log and print the metrics, and keep its weights where they are the best so far."""
    config, position = training.config, training.position
    with progress_bar("evaluating", training.console) as show:
        evaluation = training.evaluator.run(training.model, show)
    metrics = evaluation.metrics
    log.write("eval", epoch, position.step, **metrics.summary())
    training.console.print(f"epoch {epoch}/{config.schedule.epochs}: {metrics}")
    if metrics.mAP > position.best_mAP:
        position.best_mAP, position.best_epoch = metrics.mAP, epoch
        checkpoints.export(training.model, training.run.best, config=config)
    return evaluation


def _log_step(training: Training, epoch: int, losses: dict[str, Tensor], log: MetricsLog) -> str | None:
    """Every so many steps: write the losses and return what the progress bar shows of them."""
    step = training.position.step
    if step % training.config.training.log_every:
        return None
    numbers = {name: loss.item() for name, loss in losses.items()}
    log.write("step", epoch, step, **numbers)
    _check_finite(numbers["total"], epoch, step)
    return f"loss {numbers['total']:.3f}"


def _log_epoch(
    training: Training,
    epoch: int,
    losses: dict[str, float],
    triplets_per_second: float,
    seconds: float,
    clock: StepClock,
    log: MetricsLog,
) -> None:
    laps, peak_bytes = clock.seconds(), peak_memory(training.device)
    mfu, base_rate = triplets_per_second * training.flops / training.peak, training.config.optimizer.base_rate
    numbers: dict[str, Any] = {
        **losses,
        "learning_rate": rate_at(epoch, base_rate, base_rate, training.config.schedule),
        "seconds": seconds,
        "triplets_per_second": triplets_per_second,
        "mfu": mfu,
        **{f"{name}_seconds": lap for name, lap in laps.items()},
        "peak_memory_bytes": peak_bytes,
    }
    log.write("epoch", epoch, training.position.step, **numbers)
    _check_finite(losses["total"], epoch, training.position.step)
    training.console.print(
        f"epoch {epoch}/{training.config.schedule.epochs}: loss {losses['total']:.4f}, "
        f"{triplets_per_second:.1f} triplets/s, MFU {mfu:.1%}, "
        f"{', '.join(f'{name} {lap / sum(laps.values()):.0%}' for name, lap in laps.items())}, "
        f"peak memory {f'{peak_bytes / 2**30:.2f} GiB' if peak_bytes else 'unknown'}"
    )


def _check_finite(loss: float, epoch: int, step: int) -> None:
    if not math.isfinite(loss):
        raise InputError(f"training diverged: the loss is {loss} at step {step} of epoch {epoch}")

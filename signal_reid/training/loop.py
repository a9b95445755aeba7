"""The training loop: reads top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from signal_reid import checkpoints
from signal_reid.config import Config
from signal_reid.data import Dataset, augmentation_generator, prefetch
from signal_reid.evaluation.evaluator import Evaluation
from signal_reid.methods.base import Method
from signal_reid.runtime.console import make_console, progress_bar
from signal_reid.runtime.distributed import ALONE, Processes
from signal_reid.runtime.errors import InputError
from signal_reid.training.clock import StepClock
from signal_reid.training.interruption import Interruption, TrainingStopped
from signal_reid.training.meters import RunningMeans
from signal_reid.training.run_directory import MetricsLog, NoLog, RunDirectory
from signal_reid.training.run_log import working_in
from signal_reid.training.schedule import rate_at, set_rates
from signal_reid.training.setup import Training, prepare
from signal_reid.training.throughput import peak_memory, reset_peak_memory
from signal_reid.training.training_state import save


class DivergedError(InputError):
    """A loss that is no longer finite."""


@dataclass(frozen=True)
class TrainingResult:
    """What a training leaves.

    Args:
        model: with its last weights; with those of the best epoch where identities were held out to choose it on.
        dataset: with the training samples that were trained on.
        evaluation: of this model on the test set.
        best_mAP: on what the best epoch was chosen on: the test set, or the identities held out.
        best_epoch: from 1.
    """

    model: Method
    config: Config
    """With what the training measured, such as the ranges of deep images."""
    dataset: Dataset
    evaluation: Evaluation
    best_mAP: float  # noqa: N815 - the field's name
    best_epoch: int


def train(
    config: Config,
    *,
    resume: bool = False,
    console: Console | None = None,
    processes: Processes = ALONE,
    asked: Callable[[], int] = lambda: 0,
) -> TrainingResult:
    """Train a model and write its run directory, `config.output`; `signal_reid.train` writes its report as well.

    Args:
        config: everything that the run depends on.
        resume: continue from the checkpoint in the run directory; on the CPU the losses are those of a run that was
            never interrupted, bit for bit.
        console: where lines and progress bars are shown; the standard error by default.
        processes: that share the training, each with a part of every batch; only process 0 reads and writes the run
            directory. See docs/cluster.md.
        asked: asked after each step for the number of a signal by which the training is to stop; 0: it goes on.

    Raises:
        TrainingStopped: it was asked to stop, and saved.
        LostProcessError: another process ended or kept the others waiting too long.
        FileExistsError: the run directory holds a run and `resume` is not set.
        FileNotFoundError: a missing dataset, weights file or run.
        InUseError: another process trains in the run directory.
        InputError: a dataset, checkpoint or setting that cannot be used, or a loss that is no longer finite.
    """
    console = console or make_console()
    interruption = Interruption(processes, asked, config.training.checkpoint_minutes)
    with working_in(RunDirectory(config.output), console) if processes.first else nullcontext():
        return run_epochs(prepare(config, resume, console, processes), interruption)


def run_epochs(training: Training, interruption: Interruption) -> TrainingResult:
    """Train from where the training stands to its last epoch."""
    config, run, position = training.config, training.run, training.position
    epochs, first = config.schedule.epochs, training.processes.first
    with MetricsLog(run, position.step, training.console.print) if first else NoLog() as log:
        for epoch in range(position.epoch + 1, epochs + 1):
            train_epoch(training, epoch, log, interruption)
            position.epoch, position.within, position.sums, last = epoch, 0, {}, epoch == epochs
            if last or epoch % config.evaluation.every == 0:
                evaluation = evaluate_epoch(training, epoch, log)
            if last and first:
                checkpoints.export(training.model, run.last, config=config)
            if last or epoch % config.training.checkpoint_every == 0:
                _save(training, log)
        if training.validator is not None:
            evaluation = measure_chosen(training, log)
        interruption.close()
    return TrainingResult(training.model, config, training.dataset, evaluation, position.best_mAP, position.best_epoch)


def train_epoch(training: Training, epoch: int, log: MetricsLog | NoLog, interruption: Interruption) -> None:
    """Go through the training split once, and log and print what was measured; an epoch that was begun is finished.

    Raises:
        TrainingStopped: it was asked to stop, and saved.
    """
    config, console, device, trainee = training.config, training.console, training.device, training.trainee
    step, position, loader = training.step, training.position, training.loader
    loader.set_epoch(epoch, position.within)
    set_rates(trainee.optimizer, epoch, config.optimizer.base_rate, config.schedule)
    trainee.model.train()
    means, started, begun = RunningMeans(position.sums, position.within), time.perf_counter(), position.within
    total = begun + len(loader)
    reset_peak_memory(device)
    clock = StepClock(device)

    with progress_bar(f"epoch {epoch}/{config.schedule.epochs}", console) as show:
        for index, batch in enumerate(prefetch(loader, device), begun):
            generator = augmentation_generator(config.training.seed, epoch, index)
            images = training.augmentation.augment(batch.images, generator, loader.sampler.rows, config.data.batch_size)
            clock.lap("data")

            trainee.optimizer.zero_grad(set_to_none=True)
            losses = step.forward(images, batch.cameras, batch.labels)
            clock.lap("forward")

            step.backward(losses["total"])
            clock.lap("backward")

            trainee.scaler.step(trainee.optimizer)
            trainee.scaler.update()
            clock.lap("optimizer")

            position.step, position.within = position.step + 1, index + 1
            means.add(losses)
            show(index + 1, total, _log_step(training, epoch, total, losses, log))
            _perhaps_save(training, epoch, means, log, interruption)

    step.agree()
    mean_losses = means.means()  # waits for the device, so the time ends where the work does
    seconds = time.perf_counter() - started
    triplets = (position.within - begun) * config.data.batch_size
    _log_epoch(training, epoch, mean_losses, triplets / seconds, seconds, clock, log)


def _perhaps_save(
    training: Training, epoch: int, means: RunningMeans, log: MetricsLog | NoLog, interruption: Interruption
) -> None:
    """Save within an epoch where that is due, or where the training is asked to stop, which ends it."""
    stopped_by = interruption.stop()
    if stopped_by is None and not interruption.due():
        return
    position = training.position
    position.sums = means.sums()
    _save(training, log)
    if stopped_by is not None:
        interruption.close()
        raise TrainingStopped(
            f"stopped by {stopped_by} and saved after step {position.within} of epoch {epoch}; "
            f"--resume {training.run.path} goes on"
        )


def _save(training: Training, log: MetricsLog | NoLog) -> None:
    """Every process has the same state, and process 0 writes it."""
    log.flush()
    if training.processes.first:
        save(training.run, training.config, training.trainee, training.position)


def evaluate_epoch(training: Training, epoch: int, log: MetricsLog | NoLog) -> Evaluation:
    """Evaluate the model as it is, log and print the metrics, and keep its weights where they are the best so far.

    The test set is evaluated, or the training identities held out instead.
    """
    config, position = training.config, training.position
    honest = training.validator is not None
    with progress_bar("evaluating", training.console) as show:
        evaluation = (training.validator or training.evaluator).run(training.model, show)
    metrics = evaluation.metrics
    log.write("validation" if honest else "eval", epoch, position.step, **_numbers(evaluation))
    training.console.print(f"epoch {epoch}/{config.schedule.epochs}: {'held out: ' if honest else ''}{metrics}")
    if metrics.mAP > position.best_mAP:
        position.best_mAP, position.best_epoch = metrics.mAP, epoch
        if training.processes.first:
            checkpoints.export(training.model, training.run.best, config=config)
    return evaluation


def measure_chosen(training: Training, log: MetricsLog | NoLog) -> Evaluation:
    """Load the weights of the best epoch, which the test set had no part in choosing, and measure them on it."""
    position, processes = training.position, training.processes
    processes.from_first((lambda: True) if processes.first else None)  # has written the weights
    checkpoints.load(training.model, training.run.best)
    with progress_bar("evaluating", training.console) as show:
        evaluation = training.evaluator.run(training.model, show)
    log.write("eval", position.best_epoch, position.step, **_numbers(evaluation))
    training.console.print(f"epoch {position.best_epoch}, chosen on held-out identities: test set {evaluation.metrics}")
    return evaluation


def _numbers(evaluation: Evaluation) -> dict[str, float]:
    """What a row says of an evaluation, the plain numbers apart where something is done to them at test."""
    plain = {} if evaluation.plain is None else evaluation.plain.summary()
    return {**evaluation.metrics.summary(), **{f"plain_{name}": value for name, value in plain.items()}}


def _log_step(
    training: Training, epoch: int, steps: int, losses: dict[str, Tensor], log: MetricsLog | NoLog
) -> str | None:
    """Every so many steps: write the losses, and return what the progress bar shows of them.

    Where there is no terminal, and so no bar, a line says it now and then.
    """
    position, console, epochs = training.position, training.console, training.config.schedule.epochs
    if position.step % training.config.training.log_every or not training.processes.first:
        return None
    values = torch.stack([loss.detach() for loss in losses.values()]).tolist()  # waits for the device once
    numbers = dict(zip(losses, values, strict=True))
    log.write("step", epoch, position.step, **numbers)
    _check_finite(numbers["total"], epoch, position.step)
    left = training.outlook.left(epoch, position.within / steps)
    text = f"loss {numbers['total']:.3f}{'' if left is None else f', {left}'}"
    if not console.is_terminal and training.outlook.line_due():
        console.print(f"epoch {epoch}/{epochs}, step {position.within}/{steps}: {text}")
    return text


def _log_epoch(
    training: Training,
    epoch: int,
    losses: dict[str, float],
    triplets_per_second: float,
    seconds: float,
    clock: StepClock,
    log: MetricsLog | NoLog,
) -> None:
    laps, peak_bytes = clock.seconds(), peak_memory(training.device)
    mfu = triplets_per_second * training.flops / (training.peak * training.processes.size)
    base_rate = training.config.optimizer.base_rate
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
    left = training.outlook.left(epoch, 1.0)
    training.console.print(
        f"epoch {epoch}/{training.config.schedule.epochs}: loss {losses['total']:.4f}{_apart(losses)}, "
        f"{triplets_per_second:.1f} {training.dataset.unit}/s, MFU {mfu:.1%}, "
        f"{', '.join(f'{name} {lap / sum(laps.values()):.0%}' for name, lap in laps.items())}, "
        f"peak memory {f'{peak_bytes / 2**30:.2f} GiB' if peak_bytes else 'unknown'}"
        f"{f'; {left}' if left is not None and epoch < training.config.schedule.epochs else ''}"
    )


def _apart(losses: dict[str, float]) -> str:
    """What the method tells of its losses, such as the accuracy of its heads, as means over the losses it tells of."""
    told: dict[str, list[float]] = {}
    for name, value in losses.items():
        if "." in name:
            told.setdefault(name.rpartition(".")[2], []).append(value)
    means = {name: sum(values) / len(values) for name, values in told.items()}
    texts = [f"{name} {mean:.1%}" if name == "accuracy" else f"{name} {mean:.3f}" for name, mean in means.items()]
    return f" ({', '.join(texts)})" if texts else ""


def _check_finite(loss: float, epoch: int, step: int) -> None:
    if not math.isfinite(loss):
        raise DivergedError(f"training diverged: the loss is {loss} at step {step} of epoch {epoch}")

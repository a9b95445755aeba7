"""The training loop: reads top to bottom."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from rich.console import Console

from signal_reid import checkpoints
from signal_reid.config import Config
from signal_reid.data import Augmentation, Dataset, augmentation_generator, make_train_loader, open_dataset, prefetch
from signal_reid.evaluation.evaluator import Evaluation, Evaluator
from signal_reid.methods.signal.model import Signal, build_model
from signal_reid.runtime.console import make_console, progress_bar
from signal_reid.runtime.device import choose_device, choose_precision
from signal_reid.runtime.errors import InputError
from signal_reid.training.clock import StepClock
from signal_reid.training.meters import RunningMeans
from signal_reid.training.optimizer import make_optimizer
from signal_reid.training.resume import Progress, restore, save
from signal_reid.training.run_directory import MetricsLog, RunDirectory
from signal_reid.training.schedule import set_rates
from signal_reid.training.step import TrainingStep, wants_compile
from signal_reid.training.throughput import peak_flops, peak_memory, reset_peak_memory, training_flops


@dataclass(frozen=True)
class TrainingResult:
    """What a training leaves: the model with its last weights, the last evaluation, and the best epoch."""

    model: Signal
    dataset: Dataset
    evaluation: Evaluation
    best_mAP: float  # noqa: N815 - the field's name
    best_epoch: int


def train(config: Config, *, resume: bool = False, console: Console | None = None) -> TrainingResult:
    """Train a model and write its run directory, `config.output`.

    Args:
        config: everything that the run depends on.
        resume: continue from the checkpoint in the run directory; on the CPU the losses are those of a run that was
            never interrupted, bit for bit.
        console: where lines and progress bars are shown; the standard error by default.

    Raises:
        FileExistsError: the run directory holds a run and `resume` is not set.
        FileNotFoundError: a missing dataset, weights file or run.
        ValueError: a dataset, checkpoint or setting that cannot be used, or a loss that is no longer finite.
    """
    console = console or make_console()
    device = choose_device(config.training.device)
    precision = choose_precision(config.training.precision, device)
    run = RunDirectory(config.output)
    run.check(resume)
    wants_compile(config, device)  # settings that contradict each other are refused before anything is read

    dataset = open_dataset(config.data.dataset, config.data.root)
    with progress_bar("decoding images", console) as show:
        loader = make_train_loader(config, dataset, device, progress=show)
        evaluator = Evaluator(config, dataset, device, progress=show)
    augmentation = Augmentation(config.data)

    torch.manual_seed(config.training.seed)
    model = build_model(config, dataset.num_train_identities, dataset.num_cameras).to(device)
    optimizer = make_optimizer(model, config.optimizer)
    scaler = precision.scaler()
    progress = Progress()
    if resume and run.checkpoint.exists():
        progress = restore(run, config, model, optimizer, scaler)
        console.print(f"continuing {run.path} after epoch {progress.epoch}, step {progress.step}")
    else:
        if config.model.backbone.weights is None:
            console.print("the backbone starts from random weights; model.backbone.weights= takes CLIP's")
        else:
            console.print(checkpoints.load_backbone(model, config.model.backbone.weights).summary())
        run.start(config)

    model.backbone.checkpointing = config.training.gradient_checkpointing
    torch.compiler.reset()  # what an earlier run in this process compiled counts against dynamo's limit
    step = TrainingStep(model, config, precision, scaler)
    compile_shown = False
    flops, (peak, peak_source) = training_flops(config), peak_flops(precision)
    console.print(
        f"{config.data.dataset}: {len(dataset.train)} triplets of {dataset.num_train_identities} identities from "
        f"{dataset.num_cameras} cameras; {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"{flops / 1e9:.1f} GFLOP a triplet; {precision.name} on {device}, MFU of {peak / 1e12:.2f} TFLOP/s "
        f"({peak_source})"
    )

    with MetricsLog(run, progress.step, console.print) as log:
        for epoch in range(progress.epoch + 1, config.schedule.epochs + 1):
            loader.set_epoch(epoch)
            set_rates(optimizer, epoch, config.optimizer.base_rate, config.schedule)
            model.train()
            means, triplets, started = RunningMeans(), 0, time.perf_counter()
            reset_peak_memory(device)
            clock = StepClock(device)

            with progress_bar(f"epoch {epoch}/{config.schedule.epochs}", console) as show:
                for index, batch in enumerate(prefetch(loader, device)):
                    generator = augmentation_generator(config.training.seed, epoch, index)
                    images = augmentation.augment(batch.images, generator)
                    clock.lap("data")

                    optimizer.zero_grad(set_to_none=True)
                    parts = step.forward(images, batch.cameras, batch.labels)
                    clock.lap("forward")

                    step.backward(parts["total"])
                    clock.lap("backward")

                    scaler.step(optimizer)
                    scaler.update()
                    clock.lap("optimizer")

                    if not compile_shown:
                        _show_compilation(step, console)
                        compile_shown = True
                    progress.step += 1
                    triplets += len(batch.labels)
                    means.add(parts)
                    text = None
                    if progress.step % config.training.log_every == 0:
                        losses = {name: part.item() for name, part in parts.items()}
                        log.write("step", epoch, progress.step, **losses)
                        _check_finite(losses["total"], epoch, progress.step)
                        text = f"loss {losses['total']:.3f}"
                    show(index + 1, len(loader), text)

            losses = means.means()  # waits for the device, so the time ends where the work does
            seconds = time.perf_counter() - started
            laps, peak_bytes = clock.seconds(), peak_memory(device)
            log.write(
                "epoch",
                epoch,
                progress.step,
                **losses,
                learning_rate=max(group["lr"] for group in optimizer.param_groups),
                seconds=seconds,
                triplets_per_second=triplets / seconds,
                mfu=triplets / seconds * flops / peak,
                **{f"{name}_seconds": lap for name, lap in laps.items()},
                peak_memory_bytes=peak_bytes,
            )
            _check_finite(losses["total"], epoch, progress.step)
            console.print(
                f"epoch {epoch}/{config.schedule.epochs}: loss {losses['total']:.4f}, "
                f"{triplets / seconds:.1f} triplets/s, MFU {triplets / seconds * flops / peak:.1%}, "
                f"{', '.join(f'{name} {lap / sum(laps.values()):.0%}' for name, lap in laps.items())}, "
                f"peak memory {f'{peak_bytes / 2**30:.2f} GiB' if peak_bytes else 'unknown'}"
            )

            progress.epoch = epoch
            last = epoch == config.schedule.epochs
            if last or epoch % config.evaluation.every == 0:
                with progress_bar("evaluating", console) as show:
                    evaluation = evaluator.run(model, show)
                metrics = evaluation.metrics
                log.write("eval", epoch, progress.step, **metrics.summary())
                console.print(f"epoch {epoch}/{config.schedule.epochs}: {metrics}")
                if metrics.mAP > progress.best_mAP:
                    progress.best_mAP, progress.best_epoch = metrics.mAP, epoch
                    checkpoints.export(model, run.best, config=config)
            if last:
                checkpoints.export(model, run.last, config=config)
            if last or epoch % config.training.checkpoint_every == 0:
                save(run, config, model, optimizer, scaler, progress)

    return TrainingResult(model, dataset, evaluation, progress.best_mAP, progress.best_epoch)


def _show_compilation(step: TrainingStep, console: Console) -> None:
    if step.compiled:
        console.print(
            f"the first step took {step.first_seconds:.0f} s, most of it compilation; --no-compile does without"
        )
    elif step.compile_error is not None:
        console.print(f"torch.compile failed, the run goes on without it: {step.compile_error}")


def _check_finite(loss: float, epoch: int, step: int) -> None:
    if not math.isfinite(loss):
        raise InputError(f"training diverged: the loss is {loss} at step {step} of epoch {epoch}")

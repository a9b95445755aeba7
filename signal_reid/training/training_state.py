"""The state of a training run, for a resumed run to go on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from signal_reid.checkpoints.errors import CheckpointError
from signal_reid.checkpoints.exporting import metadata
from signal_reid.checkpoints.reading import load_objects
from signal_reid.checkpoints.wrapping import unwrap
from signal_reid.config import Config
from signal_reid.runtime.distributed import ALONE, Processes
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.files import write_file
from signal_reid.runtime.text import shown
from signal_reid.training import state_checks
from signal_reid.training.run_directory import RunDirectory

FORMAT = "signal-reid training state"
VERSION = 1
_PARTS = ("model", "optimizer", "scaler", "progress", "rng", "metadata")


@dataclass
class Position:
    """How far a training is; epochs and steps count from 1, and are 0 before the first."""

    epoch: int = 0
    step: int = 0
    """Steps of the whole training."""
    within: int = 0
    """Steps of the epoch after `epoch` that are done."""
    best_mAP: float = -1.0  # noqa: N815 - the field's name
    best_epoch: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    """Sum of each loss over these steps."""


_POSITION = {"epoch": int, "step": int, "best_mAP": float, "best_epoch": int}
_WITHIN = 2
"""Version of a state within an epoch, which earlier versions of this program would take for one at its beginning."""


@dataclass(frozen=True)
class Trainee:
    """What a step of a training changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def save(run: RunDirectory, config: Config, trainee: Trainee, position: Position) -> None:
    """Replace the run's checkpoint, whole or not at all."""
    save_training_state(
        run.checkpoint,
        model=trainee.model,
        optimizer=trainee.optimizer,
        scaler=trainee.scaler,
        progress=asdict(position),
        config=config,
        version=_WITHIN if position.within else VERSION,
    )


def is_finished(run: RunDirectory, config: Config) -> bool:
    """Whether the run's checkpoint covers its last epoch, and nothing is left to be measured.

    Raises:
        CheckpointError: it is damaged.
    """
    progress = load_training_state(run.checkpoint)["progress"]
    epoch = dict(state_checks.numbers(progress, {"epoch": int}))["epoch"]
    return bool(epoch >= config.schedule.epochs) and _is_measured(run, config)


def _is_measured(run: RunDirectory, config: Config) -> bool:
    """Whether the best epoch was measured on the test set, where that follows the last checkpoint."""
    return not config.training.validation or run.measured()


def restore(
    run: RunDirectory, config: Config, trainee: Trainee, say: Callable[[str], None], processes: Processes = ALONE
) -> Position:
    """Load the run's checkpoint into what is trained, and drop the metrics of what comes after it.

    What is wrong with the metrics is told to `say`. Of several processes only process 0 reads and writes the run, and
    gives the others what it read.

    Raises:
        InputError: the run is finished, its checkpoint is damaged, or a setting differs that would change the losses.
    """
    state, measured = processes.from_first(lambda: (load_training_state(run.checkpoint), _is_measured(run, config)))
    try:
        position = Position(**dict(state_checks.numbers(state["progress"], _POSITION)))
        if "within" in state["progress"]:
            position.within, position.sums = state_checks.within_epoch(state["progress"])
        if position.epoch >= config.schedule.epochs and measured:
            raise InputError(
                f"{run.path} is finished: epoch {position.epoch} of {config.schedule.epochs}; `signal-reid report "
                f"{run.path}` writes its report, and --resume with schedule.epochs=N trains it for more epochs"
            )
        state_checks.check_rng(state["rng"])
        restore_training_state(state, model=trainee.model, optimizer=trainee.optimizer, scaler=trainee.scaler)
        restore_rng(state["rng"])
    except CheckpointError as error:
        raise CheckpointError(f"{run.checkpoint}: {error}") from None
    if processes.first:
        run.resume(config, position.epoch, say, position.step if position.within else None)
    where = f", step {position.within} of the next" if position.within else ""
    say(f"continuing {run.path} after epoch {position.epoch}{where}, step {position.step} in all")
    return position


def save_training_state(
    path: str | Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    progress: Mapping[str, Any],
    config: Config | str | None = None,
    version: int = VERSION,
) -> None:
    """Write everything that a resumed run needs into one file.

    One file renamed into place, so that a kill at any moment leaves the previous state or this one, never a mixture.
    `signal_reid.checkpoints.load` reads the weights from it too.

    Args:
        path: the file to replace.
        model: a method's model, perhaps wrapped by DistributedDataParallel or torch.compile.
        optimizer: its state is saved.
        scaler: the gradient scaler, or None for a precision without one.
        progress: where the run stands (epoch, step in the epoch, best metric...): plain values and tensors by name.
        config: the configuration of the run, or its YAML.
        version: of the format.

    Raises:
        TypeError: `progress` holds something that is not a number, text, tensor or container of these.
        OSError: the file cannot be written; what was there before is untouched.
    """
    inner = unwrap(model)
    state = {
        "format": FORMAT,
        "version": version,
        "model": dict(inner.state_dict()),
        "optimizer": optimizer.state_dict(),
        "scaler": {} if scaler is None else scaler.state_dict(),
        "progress": dict(progress),
        "rng": capture_rng(),
        "metadata": metadata(inner, config),
    }
    _check_plain(state, "")
    write_file(path, lambda file: torch.save(state, file))


def load_training_state(path: str | Path) -> dict[str, Any]:
    """Read what `save_training_state` wrote, on the CPU.

    Returns:
        `model`, `optimizer`, `scaler`, `progress`, `rng` and `metadata` (text, with `config` if it was saved) by name.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged, is of another kind, or of a version that this one cannot read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"training state: no file {path}")
    state = load_objects(path)
    kind = state.get("format") if isinstance(state, dict) else None
    if not isinstance(kind, str) or kind != FORMAT:
        raise CheckpointError(f"{path}: not a training state; weights alone are loaded with checkpoints.load")
    version = state.get("version")
    if type(version) is not int or version not in (VERSION, _WITHIN):
        raise CheckpointError(
            f"{path}: a training state of version {shown(version)}, this signal-reid reads version {_WITHIN}"
        )
    broken = [part for part in _PARTS if not isinstance(state.get(part), dict)]
    if broken:
        raise CheckpointError(f"{path}: the training state lacks {', '.join(broken)}")
    return {part: state[part] for part in _PARTS}


def restore_training_state(
    state: Mapping[str, Any],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Put a loaded state into the model, the optimizer and the scaler; `restore_rng` takes the generators.

    Everything is checked before anything is loaded: an optimizer's kernels trust that its tensors are as large as the
    parameters and lie in memory as they do.

    Raises:
        CheckpointError: the state is of another model, optimizer or precision, or is damaged.
    """
    inner = unwrap(model)
    state_checks.check_model(inner.state_dict(), state["model"])
    if (scaler is not None and scaler.is_enabled()) != bool(state["scaler"]):
        with_, now = ("with", "without") if state["scaler"] else ("without", "with")
        raise CheckpointError(f"the training state was saved {with_} a gradient scaler, this run is {now} one")
    moments = state_checks.checked_optimizer(optimizer, state["optimizer"])
    if state["scaler"]:
        state_checks.check_scaler(state["scaler"])
    optimizer.load_state_dict(moments)
    inner.load_state_dict(state["model"])
    if scaler is not None and state["scaler"]:
        scaler.load_state_dict(state["scaler"])


def capture_rng() -> dict[str, Any]:
    """States of PyTorch's global generators, of the CPU and of every CUDA device."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_rng(rng: Mapping[str, Any]) -> None:
    """Set the generators to the states of `capture_rng`; CUDA devices that are no longer there are passed over.

    Raises:
        CheckpointError: a state is damaged.
    """
    state_checks.check_rng(rng)
    torch.set_rng_state(rng["cpu"])
    for device, state in enumerate(rng["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)


def _check_plain(value: Any, where: str) -> None:
    """Only what `torch.load(weights_only=True)` reads back."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif value is not None and type(value) not in (bool, int, float, str) and not isinstance(value, Tensor):
        raise TypeError(f"training state: {where} must be a number, text or tensor, got {type(value).__name__}")

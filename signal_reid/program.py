"""What the commands `train`, `eval` and `export` do, for scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from signal_reid import checkpoints
from signal_reid.config import Config
from signal_reid.evaluation.evaluator import Evaluation, Evaluator
from signal_reid.evaluation.trained import load_model, load_trained
from signal_reid.report.run_report import report_on_training
from signal_reid.runtime.console import make_console
from signal_reid.runtime.distributed import ALONE, Processes
from signal_reid.training.loop import TrainingResult
from signal_reid.training.loop import train as run_training
from signal_reid.training.run_directory import RunDirectory


def train(config: Config, *, resume: bool = False, console: Console | None = None) -> TrainingResult:
    """Train a model as `signal-reid train` does: the run directory, `config.output`, with its report.

    See `signal_reid.training.train` for the arguments and the errors.
    """
    console = console or make_console()
    result = run_training(config, resume=resume, console=console)
    path = report_on_training(RunDirectory(config.output), result.config, result.dataset, result.evaluation)
    console.print(f"best mAP {result.best_mAP:.1%} in epoch {result.best_epoch}; report in {path}")
    return result


def evaluate(
    weights: str | Path,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    processes: Processes = ALONE,
) -> Evaluation:
    """Evaluate weights on the query and gallery of a data set, as `signal-reid eval` does.

    Args:
        weights: a checkpoint of any supported naming.
        config: a published name or a file; none: the configuration that the weights carry, else `config.yml` beside
            them.
        overrides: `key=value` settings applied on top, such as `data.root=/data`.
        processes: that share the work.

    Returns:
        The features of both sets and their metrics.

    Raises:
        FileNotFoundError, ConfigError, CheckpointError, DataError, InputError: see `load_trained`.
    """
    trained = load_trained(Path(weights), config, overrides, processes)
    return Evaluator(trained.config, trained.dataset, trained.device, processes=processes).run(trained.model)


def export(
    weights: str | Path,
    output: str | Path,
    naming: str = "ours",
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """Write weights again, as `signal-reid export` does: from any supported naming to ours or another program's.

    Args:
        weights, config, overrides: as for `evaluate`; no data set is needed.
        output: the file to replace.
        naming: `ours`, or one that the method can write, such as Signal's `authors`.

    Returns:
        What was loaded, in a few lines.

    Raises:
        ConfigError, CheckpointError, InputError, OSError: see `load_trained` and `checkpoints.export`.
    """
    loaded, model, report = load_model(Path(weights), config, overrides)
    checkpoints.export(model, output, naming, loaded)
    return report.summary()

"""What the commands `train`, `eval`, `show`, `report` and `export` do, for scripts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from signal_reid import checkpoints
from signal_reid.config import Config
from signal_reid.evaluation.evaluator import Evaluation, Evaluator
from signal_reid.evaluation.trained import Trained, load_beside, load_model, load_trained
from signal_reid.figures import Picture
from signal_reid.report.history import FRACTIONS, LABELS, best_row, is_finite, label
from signal_reid.report.picture_samples import TestSamples
from signal_reid.report.pictures import GeneralPicture, Request, draw_models, find_picture, untaught
from signal_reid.report.ranking import find_query
from signal_reid.report.request import PRETRAINED, USUAL, PageRequest
from signal_reid.report.run_comparison import compare_runs
from signal_reid.report.run_report import report_on_training, report_on_weights
from signal_reid.runtime.console import make_console, progress_bar
from signal_reid.runtime.distributed import ALONE, Processes
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.files import check_writable
from signal_reid.training.loop import TrainingResult
from signal_reid.training.loop import train as run_training
from signal_reid.training.run_directory import RunDirectory
from signal_reid.training.run_log import working_in


def train(
    config: Config,
    *,
    resume: bool = False,
    console: Console | None = None,
    processes: Processes = ALONE,
    asked: Callable[[], int] = lambda: 0,
) -> TrainingResult:
    """Train a model as `signal-reid train` does: the run directory, `config.output`, with its report.

    See `signal_reid.training.train` for the arguments and the errors.
    """
    console = console or make_console()
    run = RunDirectory(config.output)
    with working_in(run, console) if processes.first else nullcontext():
        result = run_training(config, resume=resume, console=console, processes=processes, asked=asked)
        if not processes.first:
            return result
        path = report_on_training(run, result.config, result.dataset, result.evaluation, result.model)
        where = "on held-out training identities" if config.training.validation else "on the test set, which chose it"
        best = best_row(run.rows()) or {"mAP": result.best_mAP}
        measured = [name for name in LABELS if name in FRACTIONS and is_finite(best.get(name))]
        numbers = ", ".join(f"{label(name)} {best[name]:.1%}" for name in measured)
        console.print(f"best epoch {result.best_epoch}, {where}: {numbers}; report in {path}")
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


def report(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    request: PageRequest | None = None,
    console: Console | None = None,
) -> Path:
    """Write a run's report again, as `signal-reid report RUN` does.

    Args:
        run: its directory.
        overrides: `key=value` settings on top of the run's, such as `data.root=/data`.
        request: how much to show; none: what is usual.
        console: for what was loaded and for progress; none: silence.

    Returns:
        The page, `report.html` in the directory.

    Raises:
        FileNotFoundError: a directory that holds no run, no weights, or no data set.
        ConfigError, CheckpointError, DataError, InputError: see `load_trained` and `report_on_training`.
    """
    console, directory = console or make_console(quiet=True), RunDirectory(run)
    directory.check(resume=True)
    check_writable(directory.report)
    trained = load_trained(directory.weights, directory.config, [*overrides, f"output={run}"])
    config, dataset, model, request = trained.config, trained.dataset, trained.model, request or USUAL
    evaluation = _evaluated(trained, request, console)
    return report_on_training(directory, config, dataset, evaluation, model, request, trained.report)


def report_weights(
    weights: str | Path,
    output: str | Path | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    request: PageRequest | None = None,
    console: Console | None = None,
) -> Path:
    """Write the page of weights without a run, such as the authors' `.pth`, as `signal-reid report --weights` does.

    Args:
        weights, config, overrides: as for `evaluate`.
        output: the page; by default beside the weights, with the suffix `.html`.
        request, console: as for `report`.

    Returns:
        The page.

    Raises:
        FileNotFoundError, ConfigError, CheckpointError, DataError, InputError: see `report`.
    """
    console, weights = console or make_console(quiet=True), Path(weights)
    path = Path(output) if output is not None else weights.with_suffix(".html")
    check_writable(path)
    trained, request = load_trained(weights, config, overrides), request or USUAL
    report_on_weights(path, weights, trained, _evaluated(trained, request, console), request)
    return path


def _evaluated(trained: Trained, request: PageRequest, console: Console) -> Evaluation:
    for name in request.queries:  # what is wrong with them, or with the weights to draw, is said before the work
        find_query(trained.dataset.query, name)
    if request.before not in (None, PRETRAINED):
        load_beside(trained.config, trained.model, trained.dataset, Path(request.before))
    console.print(trained.report.summary())
    with progress_bar("evaluating", console) as bar:
        return Evaluator(trained.config, trained.dataset, trained.device, bar).run(trained.model, bar)


def compare(
    runs: Sequence[str | Path],
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    request: PageRequest | None = None,
    console: Console | None = None,
) -> Path:
    """Write a page of runs beside each other, as `signal-reid report RUN1 RUN2 ...` does.

    Args:
        runs: run directories, at least two; the others are compared with the first.
        output: the page; by default `comparison.html` beside the first run.
        overrides: `key=value` settings on top of each run's, such as `data.root=/data`.
        request: how many ranked lists of how many items, and how large the page may be; none: what is usual.
        console: for what is missing and for progress; none: silence.

    Returns:
        The page.

    Raises:
        FileNotFoundError: a directory that holds no run.
        ConfigError, InputError: a setting, or runs that are damaged or no two.
    """
    path = Path(output) if output is not None else Path(runs[0]).resolve().parent / "comparison.html"
    console = console or make_console(quiet=True)
    return compare_runs(runs, path, overrides, console, request=request or USUAL)


def show(
    what: str,
    weights: str | Path,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    before: str | Path | None = None,
    request: Request | None = None,
    console: Console | None = None,
) -> Picture:
    """Draw a picture of what a trained model sees, as `signal-reid show` does.

    Args:
        what: the picture's name, such as `tokens`; see docs/pictures.md.
        weights, config, overrides: as for `evaluate`.
        before: weights of the same configuration to draw beside them, or `pretrained`: the model as training began.
        request: which samples, how many and how wide.
        console: for what was loaded and for progress; none: silence.

    Returns:
        The picture; `picture.figure` is Matplotlib's, `picture.save(path)` writes it, `picture.tables` are its numbers.

    Raises:
        InputError: there is no such picture, a reason why it cannot be, or no sample of a name.
        FileNotFoundError, ConfigError, CheckpointError, DataError: see `load_trained`.
    """
    request, console = request or Request(), console or make_console(quiet=True)
    trained = load_trained(Path(weights), config, overrides)
    picture = find_picture(type(trained.model), what)
    console.print(trained.report.summary())
    if isinstance(picture, GeneralPicture):
        if before is not None:
            raise InputError(f"--before has no meaning for {what}, which shows one model")
        return picture.draw(trained, request)
    reason = untaught(picture, trained.model, trained.report)
    if reason is not None:
        raise InputError(f"no picture of {what}: {weights} {reason}")
    models = {"": trained.model}
    if before is not None:
        file = None if str(before) == PRETRAINED else Path(before)
        other, told = load_beside(trained.config, trained.model, trained.dataset, file)
        console.print(told)
        models = {"before training": other, "after training": trained.model}
    with progress_bar("looking at samples", console) as bar:
        subjects = TestSamples(
            trained.config, trained.dataset, trained.device, request.queries, request.count, request.limit, bar
        )
        precision = trained.config.evaluation.precision
        return draw_models(picture, models, subjects, trained.device, precision, request.width)


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

"""The program `signal-reid`."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.table import Table

from signal_reid import checkpoints
from signal_reid.config import Config, ConfigError, dump_config, load_config
from signal_reid.data import Dataset, check_dataset, locate_dataset, open_dataset
from signal_reid.data import pack as pack_dataset
from signal_reid.data.synthetic import synthesize as synthesize_dataset
from signal_reid.evaluation import save_features
from signal_reid.evaluation.evaluator import Evaluator, Extractor
from signal_reid.methods import build_model
from signal_reid.methods.base import Method
from signal_reid.ops import BackendError
from signal_reid.runtime.console import make_console, progress_bar
from signal_reid.runtime.device import choose_device
from signal_reid.runtime.distributed import ALONE, LostProcessError, Processes, join_processes, launched
from signal_reid.runtime.environment import describe
from signal_reid.runtime.files import write_atomically
from signal_reid.training.loop import train as run_training
from signal_reid.training.run_directory import RunDirectory

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Signal (AAAI 2026): multi-modal object re-identification over RGB, near-infrared and thermal triplets.",
)
data_app = typer.Typer(no_args_is_help=True, help="Look after datasets.")
config_app = typer.Typer(no_args_is_help=True, help="Look at configurations.")
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")

console = make_console()
_LEAVE_BAR = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2), ControlType.SHOW_CURSOR)

DatasetName = Literal["rgbnt201", "rgbnt100", "msvr310"]
ConfigOption = Annotated[
    str | None,
    typer.Option("--config", "-c", help="A published name, such as rgbnt201, or a YAML file, the authors' too."),
]
WeightsOption = Annotated[Path, typer.Option("--weights", "-w", help="A checkpoint, ours or the authors'.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, in our naming or the authors'.")
]
WRITING = ("demo", "train", "report", "data")
"""Commands that write files and share no work."""


@app.callback()
def refuse_copies(context: typer.Context) -> None:
    """Of several processes each would do all of another command's work, and write the same files."""
    command, (rank, size) = context.invoked_subcommand, launched()
    if size == 1 or command not in WRITING:
        return
    if rank:
        raise typer.Exit(2)
    raise ConfigError(f"{command} runs in one process, got WORLD_SIZE={size}; only eval and extract share work")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="The run directory; must not hold a run.")] = Path("runs/demo"),
    overrides: Overrides = None,
) -> None:
    """Synthesize a data set, train a small model from scratch, evaluate before and after, write a report."""
    from signal_reid.demo import run_demo

    run_demo(load_config("demo", [*(overrides or []), f"output={output}"]), console)


@app.command()
def train(
    config: ConfigOption = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this directory.")] = None,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Short for training.compile=false.")] = False,
    overrides: Overrides = None,
) -> None:
    """Train a model; writes configuration, metrics, checkpoints and report to the run directory (`output`)."""
    from signal_reid.report.run_report import report_on_training

    if (config is None) == (resume is None):
        raise ConfigError("train takes either --config NAME_OR_FILE or --resume RUN_DIRECTORY")
    given = [*(overrides or []), *(["training.compile=false"] if no_compile else [])]
    if resume is not None:
        run = RunDirectory(resume)
        run.check(resume=True)
        loaded = load_config(run.config, [*given, f"output={resume}"])
    else:
        loaded = load_config(str(config), given)
    result = run_training(loaded, resume=resume is not None, console=console)
    path = report_on_training(RunDirectory(loaded.output), loaded, result.dataset, result.evaluation)
    console.print(f"best mAP {result.best_mAP:.1%} in epoch {result.best_epoch}; report in {path}")


@app.command(name="eval")
def evaluate(
    weights: WeightsOption,
    config: ConfigOption = None,
    output: Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file.")] = None,
    overrides: Overrides = None,
) -> None:
    """Evaluate weights on the query and gallery of a dataset; processes that torchrun starts share the work."""
    with _shared_work() as processes:
        loaded = _config_beside(weights, config, overrides)
        model, dataset, device = _load_model(loaded, weights, processes)
        with progress_bar("evaluating", console) as show:
            metrics = Evaluator(loaded, dataset, device, show, processes).run(model, show).metrics
        if not processes.first:
            return
        summary = metrics.summary()
        if output is not None:
            write_atomically(output, json.dumps({**summary, "cmc": metrics.cmc.tolist()}, indent=2).encode() + b"\n")
        table = Table(title=f"{loaded.data.dataset}, {metrics.num_valid_queries} queries", title_justify="left")
        for name in summary:
            table.add_column(name, justify="right")
        table.add_row(*(f"{value:.1%}" for value in summary.values()))
        Console().print(table)


@app.command()
def extract(
    weights: WeightsOption,
    output: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    config: ConfigOption = None,
    split: Annotated[Literal["train", "query", "gallery"], typer.Option(help="Which images.")] = "gallery",
    overrides: Overrides = None,
) -> None:
    """Write the features of a split, with names and labels; processes that torchrun starts share the work."""
    with _shared_work() as processes:
        loaded = _config_beside(weights, config, overrides)
        model, dataset, device = _load_model(loaded, weights, processes)
        samples = getattr(dataset, split)
        with progress_bar(f"extracting {split}", console) as show:
            features = Extractor(loaded, samples, device, show, processes).run(model, show)
        if not processes.first:
            return
        save_features(output, features, [sample.name for sample in samples])
        console.print(f"{len(features)} features of {features.features.shape[1]} numbers in {output}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")], overrides: Overrides = None) -> None:
    """Write a run's report again, from its metrics and its last weights (its best ones where it is not finished)."""
    from signal_reid.report.run_report import report_on_training

    directory = RunDirectory(run)
    directory.check(resume=True)
    loaded = load_config(directory.config, [*(overrides or []), f"output={run}"])
    weights = directory.last if directory.last.exists() else directory.best
    model, dataset, device = _load_model(loaded, weights)
    with progress_bar("evaluating", console) as show:
        evaluation = Evaluator(loaded, dataset, device, show).run(model, show)
    console.print(f"report in {report_on_training(directory, loaded, dataset, evaluation)}")


@app.command()
def info() -> None:
    """Print versions, devices and which operator backends are available, and why not the others."""
    table = Table(show_header=False, box=None)
    for name, value in describe().items():
        table.add_row(name, value)
    Console().print(table)


@data_app.command()
def check(
    dataset: Annotated[DatasetName, typer.Argument()],
    root: Annotated[Path, typer.Argument(help="The dataset's directory, or one that holds it.")],
    decode: Annotated[bool, typer.Option(help="Also read every image.")] = True,
) -> None:
    """List every problem of a dataset; exit code 1 when there is an error among them, 2 when there is no dataset."""
    locate_dataset(dataset, root)
    with progress_bar("reading images", console) as show:
        problems = check_dataset(dataset, root, decode, show)
    for problem in problems:
        typer.echo(f"{problem.severity}: {problem}")
    errors = sum(problem.severity == "error" for problem in problems)
    if errors:
        typer.echo(f"{errors} errors, {len(problems) - errors} warnings")
        raise typer.Exit(1)
    found = open_dataset(dataset, root)
    typer.echo(
        f"{len(found.train)} training triplets of {found.num_train_identities} identities, {len(found.query)} queries, "
        f"{len(found.gallery)} gallery triplets, {found.num_cameras} cameras; {len(problems)} warnings"
    )


@data_app.command()
def synthesize(
    dataset: Annotated[DatasetName, typer.Argument()],
    output: Annotated[Path, typer.Argument(help="The directory to write; must not exist, or be empty.")],
    train_identities: Annotated[int, typer.Option()] = 48,
    test_identities: Annotated[int, typer.Option()] = 24,
    images_per_identity: Annotated[int, typer.Option(help="Triplets of each identity.")] = 8,
    cameras: Annotated[int, typer.Option(help="Cameras; for msvr310, scenes.")] = 4,
    height: Annotated[int | None, typer.Option(help="Of a picture, in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Of a picture, in pixels.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write a synthetic data set in the layout of a published one."""
    if (height is None) != (width is None):
        raise ConfigError("--height and --width go together")
    size = None if height is None or width is None else (height, width)
    with progress_bar(f"synthesizing {dataset}", console) as show:
        synthesize_dataset(
            dataset,
            output,
            train_identities=train_identities,
            test_identities=test_identities,
            images_per_identity=images_per_identity,
            cameras=cameras,
            image_size=size,
            seed=seed,
            progress=show,
        )
    console.print(f"{dataset} synthesized in {output}")


@data_app.command()
def pack(
    config: ConfigOption = None,
    output: Annotated[Path | None, typer.Option(help="The file; by default in the dataset's directory.")] = None,
    overrides: Overrides = None,
) -> None:
    """Decode a dataset into one file that training reads without decoding (`data.cache=packed`)."""
    if config is None:
        raise ConfigError("data pack needs --config NAME_OR_FILE")
    loaded = load_config(config, overrides or [])
    with progress_bar("packing", console) as show:
        path = pack_dataset(loaded.data.dataset, loaded.data.root, loaded, output, show)
    console.print(f"packed into {path}")


@config_app.command()
def show(
    config: Annotated[str, typer.Argument(help="A published name or a YAML file.")], overrides: Overrides = None
) -> None:
    """Print a configuration, resolved, as YAML."""
    typer.echo(dump_config(load_config(config, overrides or [])), nl=False)


@config_app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A YAML file of the authors'.")],
    output: Annotated[Path, typer.Argument(help="The YAML file to write.")],
    overrides: Overrides = None,
) -> None:
    """Write the authors' configuration in our naming."""
    write_atomically(output, dump_config(load_config(source, overrides or [])).encode())
    console.print(f"{source} converted to {output}")


def _config_beside(weights: Path, config: str | None, overrides: list[str] | None) -> Config:
    """The configuration asked for, else the one of the run directory that the weights are in."""
    beside = weights.parent / "config.yml"
    if config is None and not beside.is_file():
        raise ConfigError(f"give --config NAME_OR_FILE: there is no config.yml beside {weights}")
    return load_config(config or beside, overrides or [])


def _load_model(config: Config, weights: Path, processes: Processes = ALONE) -> tuple[Method, Dataset, torch.device]:
    """The model as the weights need it, on the device, and the dataset."""
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
    console.print(checkpoints.load(model, weights).summary())
    return model.to(device), dataset, device


def main() -> None:
    """Run the program; a user's mistake is one line on the standard error and exit code 2."""
    threading.excepthook = _without_traceback
    with _one_line_errors(ALONE):
        app()


@contextmanager
def _shared_work() -> Iterator[Processes]:
    """Join the processes that torchrun started; only process 0 shows anything."""
    log = logging.getLogger("signal_reid")
    before = log.level
    with join_processes() as processes, _one_line_errors(processes):
        try:
            if not processes.first:
                console.quiet = True
                log.setLevel(logging.ERROR)
            yield processes
        finally:
            console.quiet = False
            log.setLevel(before)


@contextmanager
def _one_line_errors(processes: Processes) -> Iterator[None]:
    """Of several processes one says why all of them end."""
    try:
        yield
    except (ValueError, OSError, BackendError, LostProcessError) as error:
        with processes.reporting() as chosen:
            if chosen:
                if processes.size > 1:  # process 0 may be stopped while its progress bar is on this line
                    make_console().control(_LEAVE_BAR)
                print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(2)


def _without_traceback(problem: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread raises a full disk here and once more in the main thread, where it becomes one line."""
    if not isinstance(problem.exc_value, OSError):
        threading.__excepthook__(problem)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())

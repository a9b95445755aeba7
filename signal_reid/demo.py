"""The demo: synthesize, train a small model from scratch, evaluate before and after, write a report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from signal_reid.config import Config
from signal_reid.data import Dataset, open_configured
from signal_reid.data.synthetic import synthesize
from signal_reid.evaluation.evaluator import Evaluator
from signal_reid.methods.registry import build_model
from signal_reid.report.contents import Headline
from signal_reid.report.run_report import load_baselines, report_on_training, save_baselines
from signal_reid.runtime.console import progress_bar
from signal_reid.runtime.device import choose_device
from signal_reid.training.loop import train
from signal_reid.training.run_directory import RunDirectory
from signal_reid.training.run_log import working_in
from signal_reid.training.training_state import is_finished

TRAIN_IDENTITIES = 64
TEST_IDENTITIES = 24
IMAGES_PER_IDENTITY = 8


class RawPixels(nn.Module):
    """The pixels themselves as a feature: what a model has to beat."""

    def forward(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        return images.flatten(1)


@dataclass(frozen=True)
class DemoResult:
    """Rows of the printed table, in order, and the report."""

    headlines: tuple[Headline, ...]
    report: Path


def run_demo(config: Config, console: Console) -> DemoResult:
    """Run the demo in `config.output`; the data set is written to `data` inside it, unless it is there already.

    A demo that was interrupted goes on where it was.

    Raises:
        FileExistsError: the run directory holds a run.
        ValueError, OSError: see `train`.
    """
    run = RunDirectory(config.output)
    results = Console()  # on the standard output
    with working_in(run, console, results):
        return _run(config, run, console, results)


def _run(config: Config, run: RunDirectory, console: Console, results: Console) -> DemoResult:
    started = time.perf_counter()
    resume = _begun(run, config)
    root = run.path / "data"
    if not root.exists():
        run.path.mkdir(parents=True, exist_ok=True)
        with progress_bar("synthesizing", console) as show:
            synthesize(
                config.data.dataset,
                root,
                train_identities=TRAIN_IDENTITIES,
                test_identities=TEST_IDENTITIES,
                images_per_identity=IMAGES_PER_IDENTITY,
                image_size=config.data.image_size,
                seed=config.training.seed,
                progress=show,
            )
    config = config.model_copy(update={"data": config.data.model_copy(update={"root": str(root)})})
    dataset = open_configured(config)
    console.print(f"{len(dataset.train)} training {dataset.unit}; the test identities are others, never trained on")

    baselines = load_baselines(run) if resume else _measured_before(run, config, dataset)
    result = train(config, resume=resume, console=console)
    report = report_on_training(run, config, dataset, result.evaluation, result.model)
    rows = (*baselines, Headline.of("after training", result.evaluation.metrics))
    results.print(_table(rows))
    console.print(f"{time.perf_counter() - started:.0f} s; report in {report}")
    return DemoResult(rows, report)


def _begun(run: RunDirectory, config: Config) -> bool:
    """Whether a demo was interrupted here, which then goes on.

    Raises:
        FileExistsError: the run directory holds another run, or a demo that is trained.
    """
    if not run.checkpoint.exists() or not run.baselines.exists():
        run.check(resume=False)
        return False
    if is_finished(run, config):
        report = (
            f"its report is {run.report}" if run.report.exists() else f"signal-reid report {run.path} reports on it"
        )
        raise FileExistsError(f"{run.path} already holds a run, a finished demo: {report}; or choose another --output")
    return True


def _measured_before(run: RunDirectory, config: Config, dataset: Dataset) -> list[Headline]:
    """What the trained model is compared with: the pixels themselves, and the model as training begins."""
    device = choose_device(config.training.device)
    evaluator = Evaluator(config, dataset, device)
    torch.manual_seed(config.training.seed)
    untrained = build_model(config, dataset.num_train_identities, dataset.num_cameras).to(device)
    baselines = [
        Headline.of("raw pixel distance", evaluator.run(RawPixels()).metrics),
        Headline.of("before training", evaluator.run(untrained).metrics),
    ]
    save_baselines(run, baselines)  # now, so that a demo that is interrupted keeps them
    return baselines


def _table(rows: tuple[Headline, ...]) -> Table:
    table = Table(title="held-out identities", title_justify="left")
    for name in ("", "mAP", "R-1", "R-5", "R-10"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        table.add_row(row.name, *(f"{value:.1%}" for value in (row.mAP, row.rank1, row.rank5, row.rank10)))
    return table

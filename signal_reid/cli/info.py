"""The command `info`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from signal_reid.cli.app import ConfigOption, Overrides, console, keep_memory
from signal_reid.config import Config, ConfigError, load_config
from signal_reid.data import DataError, open_dataset
from signal_reid.ops import dispatch
from signal_reid.runtime import environment
from signal_reid.runtime.console import progress_bar
from signal_reid.runtime.device import choose_device

if TYPE_CHECKING:
    from signal_reid.training.costs import ModelCosts, ModuleCost

IDENTITIES, CAMERAS = 200, 8
"""What a model is sized for where neither the user nor a data set says."""
ABSENT = "-"


def info(
    config: ConfigOption = None,
    batch: Annotated[int, typer.Option(help="Samples of the batch that is measured.")] = 4,
    repeats: Annotated[int, typer.Option(help="How often each pass is timed; 0 leaves the times out.")] = 3,
    identities: Annotated[int | None, typer.Option(help="Classes of the heads; else the data set's.")] = None,
    cameras: Annotated[int | None, typer.Option(help="Of the camera embedding; else the data set's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes, seconds and operations.")] = False,
    overrides: Overrides = None,
) -> None:
    """Print versions, devices and backends; with --config what the model costs, module by module."""
    if config is not None:
        _print_costs(load_config(config, overrides or []), batch, repeats, identities, cameras, as_json)
        return
    if overrides:
        raise ConfigError(f"{overrides[0]}: settings go with --config NAME_OR_FILE")
    facts = {**environment.describe(), **dispatch.describe(start=True)}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a reason may have a long path in it, before the remedy
    for name, value in facts.items():
        table.add_row(name, value)
    Console().print(table)


def _print_costs(
    config: Config, batch: int, repeats: int, identities: int | None, cameras: int | None, as_json: bool
) -> None:
    from signal_reid.training.costs import measure_costs

    identities, cameras, source = _sizes(config, identities, cameras)
    device = choose_device(config.training.device)
    keep_memory(device)
    with progress_bar("measuring", console) as show:
        costs = measure_costs(config, device, batch, identities, cameras, repeats, show)
    if as_json:
        agreement = {"counted_flops": costs.counted_flops, "num_identities": identities, "num_cameras": cameras}
        typer.echo(json.dumps({**asdict(costs), **agreement}, indent=2))
        return
    out = Console(highlight=False)
    out.print(_inference(costs), _training(costs), sep="\n\n")
    for line in _remarks(costs, f"{identities} identities and {cameras} cameras ({source})"):
        out.print(line, markup=False)


def _sizes(config: Config, identities: int | None, cameras: int | None) -> tuple[int, int, str]:
    """Classes, cameras and who says so."""
    if identities is not None and cameras is not None:
        return identities, cameras, "as asked"
    try:
        dataset = open_dataset(config.data.dataset, config.data.root)
    except (DataError, FileNotFoundError):
        return identities or IDENTITIES, cameras or CAMERAS, f"no {config.data.dataset} at data.root"
    return identities or dataset.num_train_identities, cameras or dataset.num_cameras, "of the data set"


def _inference(costs: ModelCosts) -> Table:
    table = _table(
        f"{costs.method}, batch {costs.batch} on {costs.device}: evaluation in {costs.evaluation_precision}",
        ("parameters, M", "GFLOP a sample", "peak, MiB", "time, ms"),
    )
    for module in (*costs.modules, costs.whole):
        cost, parameters = module.inference, f"{module.parameters / 1e6:.2f}"
        cells = [ABSENT] * 3
        if cost is not None:
            cells = [_giga(cost.flops / costs.batch), _mebi(cost.peak_bytes), _milli(cost.seconds)]
        if module is costs.whole:
            table.add_row("losses and the rest", "", _giga(_rest(costs)[0]), end_section=True)
        table.add_row(_title(module), parameters, *cells)
    return table


def _training(costs: ModelCosts) -> Table:
    table = _table(
        f"training in {costs.precision}, not compiled: forward and backward",
        ("GFLOP a sample", "kept, MiB", "forward, ms", "backward, ms"),
    )
    for module in (*costs.modules, costs.whole):
        cost, cells = module.training, [ABSENT] * 4
        if cost is not None:
            flops = (cost.forward_flops + cost.backward_flops) / costs.batch
            times = _milli(cost.forward_seconds), _milli(cost.backward_seconds)
            cells = [_giga(flops), _mebi(cost.kept_bytes), *times]
        if module is costs.whole:
            _, flops, kept = _rest(costs)
            table.add_row("losses and the rest", _giga(flops), _mebi(kept), end_section=True)
        table.add_row(_title(module), *cells)
    return table


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _title(module: ModuleCost) -> str:
    return module.name.replace("_", " ")


def _rest(costs: ModelCosts) -> tuple[float, float, int]:
    """Operations a sample of both passes, and kept bytes, of the whole model that none of its modules has."""
    passes = [module.inference for module in costs.modules if module.inference is not None]
    steps = [module.training for module in costs.modules if module.training is not None]
    whole, step = costs.whole.inference, costs.whole.training
    assert whole is not None
    assert step is not None
    inference = whole.flops - sum(p.flops for p in passes)
    training = step.forward_flops + step.backward_flops - sum(s.forward_flops + s.backward_flops for s in steps)
    kept = step.kept_bytes - sum(s.kept_bytes for s in steps)
    return inference / costs.batch, training / costs.batch, kept


def _remarks(costs: ModelCosts, sizes: str) -> list[str]:
    counted = costs.counted_flops
    return [
        f"Sized for {sizes}. {ABSENT}: never run there.",
        f"Operations of one sample, those of matrix products and convolutions. A forward in training takes "
        f"{counted / 1e9:.2f} GFLOP by PyTorch's counter; {costs.method} says {costs.said_flops / 1e9:.2f} "
        f"({costs.said_flops / counted - 1:+.2%}), by which MFU is reckoned.",
        "Memory and times of the batch. Peak: tensors alive between operators beside parameters and images. Kept: for "
        "the backward; what several modules keep counts for the first. Times: medians, each module by itself.",
        *costs.notes,
    ]


def _giga(flops: float) -> str:
    return f"{flops / 1e9:.2f}" if flops >= 1e7 or not flops else f"{flops / 1e9:.1g}"


def _mebi(size: float) -> str:
    return f"{size / 2**20:.1f}"


def _milli(seconds: float | None) -> str:
    return ABSENT if seconds is None else f"{1000 * seconds:.1f}"

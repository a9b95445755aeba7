"""Ablations: variants of one configuration, each trained with some seeds, and the page that compares them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from signal_reid.config import Config, ConfigError, load_config
from signal_reid.config.yaml_text import YamlError, read_yaml
from signal_reid.data import open_dataset
from signal_reid.methods.base import Ablation, Method
from signal_reid.methods.registry import METHODS, build_model
from signal_reid.program import train
from signal_reid.report.ablation_table import (
    SeedResult,
    VariantResult,
    ablation_csv,
    ablation_table,
    latex,
    markdown,
    runs_csv,
)
from signal_reid.report.comparison import final_and_best
from signal_reid.report.comparison_page import Lead
from signal_reid.report.run_comparison import compare_runs
from signal_reid.report.tables import file_uri
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.files import write_atomically
from signal_reid.runtime.text import shown
from signal_reid.training.loop import DivergedError
from signal_reid.training.run_directory import MAY_CHANGE_ON_RESUME, RunDirectory

NOTE = (
    "Last epoch: the model that the training ended with. Best: the epoch with the largest mAP on the test set, which "
    "papers of this field report. With several seeds: mean ± sample standard deviation. GFLOP: of a sample's forward "
    "in training."
)


@dataclass(frozen=True)
class Planned:
    """A training that an ablation asks for."""

    variant: Ablation
    seed: int
    config: Config

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.config.output)


@dataclass(frozen=True)
class AblationResult:
    """What an ablation came to, and its page."""

    variants: tuple[VariantResult, ...]
    page: Path


def run_ablation(
    source: str | Path,
    overrides: Sequence[str] = (),
    variants: Sequence[Ablation] = (),
    seeds: Sequence[int] = (),
    output: str | Path | None = None,
    *,
    console: Console,
) -> AblationResult:
    """Train each variant with each seed, and write tables and the page that compares them.

    A training that is finished is not done again, and one that was interrupted is resumed, so that the same call
    continues an ablation. A training that diverges is noted, and the others go on.

    Args:
        source: a configuration, as for `load_config`.
        overrides: settings of all variants.
        variants: with distinct names; none: those that the method offers.
        seeds: `training.seed` of each variant's trainings; none: the configuration's.
        output: a directory for all runs; by default `ablation` inside the configuration's `output`.
        console: for what is done, and progress.

    Raises:
        ConfigError: a variant that is no valid configuration, or a method that offers none.
        InputError: the directory holds a training with other settings; every training diverged.
        FileNotFoundError, DataError, OSError: see `train`.
    """
    base = load_config(source, overrides)
    directory = Path(output) if output is not None else Path(base.output) / "ablation"
    plan = plan_trainings(source, overrides, variants or offered(base), seeds or (base.training.seed,), directory)
    dataset = open_dataset(base.data.dataset, base.data.root)
    failures: dict[Path, str] = {}
    for number, planned in enumerate(plan, 1):
        console.print(f"{number} of {len(plan)}: {planned.variant.name}, seed {planned.seed}, in {planned.run.path}")
        try:
            _train(planned, console)
        except DivergedError as error:
            failures[planned.run.path] = str(error)
            console.print(str(error))
    results = _results(plan, failures, dataset.num_train_identities, dataset.num_cameras)
    for name, text in _files(results).items():
        write_atomically(directory / name, text.encode())
    return AblationResult(tuple(results), _write_page(plan, failures, results, directory, console))


def offered(config: Config) -> tuple[Ablation, ...]:
    """The variants that a configuration's method offers.

    Raises:
        ConfigError: it offers none.
    """
    method: type[Method] = METHODS.get(config.model.method)
    if not method.ablations:
        raise ConfigError(f"{method.title} offers no ablation; --variants FILE or --variant 'NAME: key=value' say one")
    return method.ablations


def plan_trainings(
    source: str | Path, overrides: Sequence[str], variants: Sequence[Ablation], seeds: Sequence[int], directory: Path
) -> list[Planned]:
    """Every training with its configuration, checked before the first begins.

    Raises:
        ConfigError: fewer than two variants, two that are one, or one that is no valid configuration.
        InputError: a run directory that holds a training with other settings.
    """
    if len(variants) < 2:
        raise ConfigError(f"an ablation takes two variants or more, got {len(variants)}")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds must differ, got {', '.join(map(str, seeds))}")
    folders = [folder_name(variant.name) for variant in variants]
    for folder, variant in zip(folders, variants, strict=True):
        if not folder or folders.count(folder) > 1:
            raise ConfigError(f"variants need names that differ in letters and digits, got {variant.name!r}")
    plan = []
    for folder, variant in zip(folders, variants, strict=True):
        for seed in seeds:
            own = [f"training.seed={seed}", f"output={directory / folder / f'seed-{seed}'}"]
            try:
                config = load_config(source, [*overrides, *variant.overrides, *own])
            except ConfigError as error:
                raise ConfigError(f"variant {variant.name}: {error}") from None
            plan.append(Planned(variant, seed, config))
    for planned in plan:
        _check_settings(planned)
    return plan


def folder_name(name: str) -> str:
    """A variant's name as that of a folder: `+ Large Rate` is `large-rate`."""
    return re.sub(r"[^\w.]+", "-", name.lower()).strip("-.")


def read_variants(path: str | Path) -> list[Ablation]:
    """Variants from a YAML file: a mapping of names to lists of `key=value`.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: a file of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"variants: no file {path}")
    try:
        content = read_yaml(path.read_bytes())
    except YamlError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{path}: variants are a mapping of names to lists of key=value")
    for name, overrides in content.items():
        if not isinstance(overrides or [], list) or not all(isinstance(text, str) for text in overrides or []):
            raise ConfigError(f"{path}: {shown(name)} must be a list of key=value, got {shown(overrides)}")
    return [Ablation(str(name), tuple(overrides or ())) for name, overrides in content.items()]


def parse_variant(text: str) -> Ablation:
    """A variant from `NAME: key=value key=value`.

    Raises:
        ConfigError: no name.
    """
    name, colon, overrides = text.partition(":")
    if not colon or not name.strip():
        raise ConfigError(f"a variant must read 'NAME: key=value key=value', got {text!r}")
    return Ablation(name.strip(), tuple(overrides.split()))


def _check_settings(planned: Planned) -> None:
    """Refuse a directory whose training has other settings: its numbers would stand in the wrong line."""
    if not planned.run.config.is_file():
        return
    free = tuple(key for key in MAY_CHANGE_ON_RESUME if key != "evaluation")
    for key, (was, now) in planned.run.changed(planned.config).items():
        if not key.startswith(free):
            raise InputError(
                f"{planned.run.path} holds a training with {key}={was}, and {planned.variant.name} has {now}; "
                "choose another --output"
            )


def _train(planned: Planned, console: Console) -> None:
    run, config = planned.run, planned.config
    if run.config.is_file() and run.finished(config.schedule.epochs):
        console.print("finished already")
        return
    run.path.mkdir(parents=True, exist_ok=True)
    train(config, resume=run.config.is_file(), console=console)


def _results(plan: Sequence[Planned], failures: dict[Path, str], identities: int, cameras: int) -> list[VariantResult]:
    results = []
    for variant in dict.fromkeys(planned.variant for planned in plan):
        trainings = [planned for planned in plan if planned.variant == variant]
        with torch.device("meta"):  # sizes alone
            model = build_model(trainings[0].config, identities, cameras)
        seeds = []
        for planned in trainings:
            failure = failures.get(planned.run.path, "")
            last, best = (None, None) if failure else final_and_best(planned.run.rows())
            seeds.append(SeedResult(planned.seed, last, best, failure))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        results.append(VariantResult(variant.name, variant.overrides, parameters, model.flops(), seeds))
    return results


def _files(results: Sequence[VariantResult]) -> dict[str, str]:
    return {
        "ablation.csv": ablation_csv(results),
        "runs.csv": runs_csv(results),
        "ablation.tex": latex(results),
        "ablation.md": markdown(results),
    }


def _write_page(
    plan: Sequence[Planned],
    failures: dict[Path, str],
    results: Sequence[VariantResult],
    directory: Path,
    console: Console,
) -> Path:
    """The page: the table, and a run of each variant, the first seed's that did not diverge, beside each other."""
    shown: dict[str, Planned] = {}
    for planned in plan:
        if planned.run.path not in failures:
            shown.setdefault(planned.variant.name, planned)
    notes = [line for result in results for line in result.failures]
    if len(shown) < 2:
        raise InputError(f"nothing to compare, too few trainings came to an end: {'; '.join(notes)}")
    several = len({planned.seed for planned in plan}) > 1
    seeds = "; ".join(f"{name}: seed {planned.seed}" for name, planned in shown.items())
    explained = [NOTE, *([f"Below one training of each variant is compared ({seeds})."] if several else [])]
    downloads = [(name, file_uri(text, name)) for name, text in _files(results).items()]
    config = plan[0].config
    method: type[Method] = METHODS.get(config.model.method)
    return compare_runs(
        [planned.run.path for planned in shown.values()],
        directory / "ablation.html",
        [f"data.root={config.data.root}", f"training.device={config.training.device}"],
        console,
        names=list(shown),
        title=f"Ablation of {method.title} on {config.data.dataset}",
        leads=[Lead(ablation_table(results), explained, downloads)],
        notes=notes,
    )

"""Commands that look after data sets: `data check`, `data synthesize`, `data pack`, `data manifest`, `data split`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from signal_reid.cli.app import ConfigOption, DatasetName, Overrides, console
from signal_reid.cli.errors import remedy_of_locale
from signal_reid.config import ConfigError, load_config
from signal_reid.data import Options, check_dataset, locate_dataset, open_dataset, options_of
from signal_reid.data import pack as pack_dataset
from signal_reid.data.depth import with_measured_ranges
from signal_reid.data.manifests import split_manifest, write_manifest
from signal_reid.data.synthetic import synthesize as synthesize_dataset
from signal_reid.runtime.console import progress_bar

Root = Annotated[Path, typer.Argument(help="The dataset's directory, or one that holds it; a manifest's file.")]
Modalities = Annotated[str | None, typer.Option(metavar="NAME,...", help="As data.modalities; by default all.")]
Unpaired = Annotated[Literal["error", "skip"] | None, typer.Option(help="As data.unpaired.")]
Queries = Annotated[Path | None, typer.Option(help="As data.queries: a file that names the samples to search with.")]


def check(
    dataset: DatasetName,
    root: Root,
    decode: Annotated[bool, typer.Option(help="Also read every image.")] = True,
    modalities: Modalities = None,
    unpaired: Unpaired = None,
    queries: Queries = None,
    config: ConfigOption = None,
    overrides: Overrides = None,
) -> None:
    """List every problem of a dataset; exit code 1 when there is an error among them, 2 when there is no dataset.

    With --config and its overrides the images are read as that training would read them.
    """
    locate_dataset(dataset, root)
    options = _options(modalities, unpaired, queries)
    if config is not None:
        settings = [*(overrides or []), f"data.dataset={dataset}", f"data.root={root}"]
        options = options_of(with_measured_ranges(load_config(config, settings)))
    elif overrides:
        raise ConfigError(f"data check takes {overrides[0]} with --config NAME_OR_FILE")
    with progress_bar("reading images", console) as show:
        problems = check_dataset(dataset, root, decode, show, options)
    for problem in problems:
        typer.echo(f"{problem.severity}: {problem}")
    errors = sum(problem.severity == "error" for problem in problems)
    if errors:
        remedy = next(filter(None, (remedy_of_locale(str(problem)) for problem in problems)), "")
        typer.echo(f"{errors} errors, {len(problems) - errors} warnings{remedy and f'; {remedy}'}")
        raise typer.Exit(1)
    found = open_dataset(dataset, root, options)
    typer.echo(
        f"{len(found.train)} training {found.unit} of {found.num_train_identities} identities, "
        f"{len(found.query)} queries, {len(found.gallery)} gallery {found.unit}, {found.cameras_in_words}; "
        f"{len(problems)} warnings"
    )


def _options(modalities: str | None, unpaired: Literal["error", "skip"] | None, queries: Path | None) -> Options:
    names = None if modalities is None else tuple(name.strip() for name in modalities.split(","))
    return Options(names, unpaired, None if queries is None else str(queries))


def manifest(
    dataset: DatasetName,
    root: Root,
    output: Annotated[Path, typer.Option(help="The CSV file to write, or a Parquet file by its suffix.")],
    modalities: Modalities = None,
    unpaired: Unpaired = None,
    queries: Queries = None,
) -> None:
    """List a dataset's samples in a file that data.dataset=manifest reads."""
    lines = write_manifest(open_dataset(dataset, root, _options(modalities, unpaired, queries)), output)
    console.print(f"{lines} lines in {output}")


def split(
    manifest: Annotated[Path, typer.Argument(help="A manifest; it needs no column split.")],
    output: Annotated[Path, typer.Option(help="The manifest to write.")],
    test: Annotated[float, typer.Option(help="Share of the identities that are tested with.")] = 0.5,
    queries: Annotated[
        int, typer.Option(help="Of each test identity and camera, how many are queries; 0: all are query and gallery.")
    ] = 1,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write a manifest again with training and test splits that share no identity."""
    counts = split_manifest(manifest, output, test, queries, seed)
    console.print(f"{', '.join(f'{count} {name}' for name, count in counts.items())} in {output}")


def synthesize(
    dataset: DatasetName,
    output: Annotated[Path, typer.Argument(help="The directory to write; must not exist, or be empty.")],
    train_identities: Annotated[int, typer.Option()] = 48,
    test_identities: Annotated[int, typer.Option()] = 24,
    images_per_identity: Annotated[int, typer.Option(help="Samples of each identity.")] = 8,
    cameras: Annotated[int, typer.Option(help="Cameras, or scenes where the protocol compares scenes.")] = 4,
    height: Annotated[int | None, typer.Option(help="Of a picture, in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Of a picture, in pixels.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write a synthetic data set in the layout of a published or installed one."""
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

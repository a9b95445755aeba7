"""Commands that search one's own images: `index build`, `add`, `info`, `calibrate` and `search`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from signal_reid.cli.app import ConfigOption, Overrides, WeightsOption, console, keep_memory
from signal_reid.cli.errors import shared_work
from signal_reid.data import open_configured
from signal_reid.evaluation import FeatureSet, save_features
from signal_reid.report.search_page import write_search_page
from signal_reid.runtime.console import progress_bar
from signal_reid.runtime.distributed import Processes, launched
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.files import check_writable, write_atomically
from signal_reid.runtime.text import escaped
from signal_reid.search import Entry, Hit, Index, Retriever, entries_of, find_entries
from signal_reid.search.segments import UNKNOWN
from signal_reid.search.sources import query_entry

IndexPath = Annotated[Path, typer.Argument(metavar="INDEX", help="The directory of the index.")]
ImagesOption = Annotated[
    Path | None,
    typer.Option(
        help="A directory with one for each modality (RGB/, TI/, ...), a list (.txt) or a manifest (.csv, .parquet)."
    ),
]
SplitOption = Annotated[
    Literal["train", "query", "gallery"] | None, typer.Option(help="Instead of images: a split of the data set.")
]
PatternsOption = Annotated[
    list[str] | None,
    typer.Option("--pattern", metavar="MODALITY=PATTERN", help="Which images are of a modality, such as TI=*_ti.png."),
]


def build(
    index: IndexPath,
    weights: WeightsOption,
    images: ImagesOption = None,
    split: SplitOption = None,
    pattern: PatternsOption = None,
    kind: Annotated[
        Literal["exact", "flat", "ivf", "hnsw"], typer.Option(help="exact, or an index of FAISS, which finds by it.")
    ] = "exact",
    storage: Annotated[Literal["fp16", "fp32"], typer.Option(help="What the features are kept in.")] = "fp16",
    config: ConfigOption = None,
    overrides: Overrides = None,
) -> None:
    """Make an index of images, or of a split with its labels; processes that torchrun starts share the work."""
    with shared_work() as processes:
        retriever = _retriever(weights, None, config, overrides, processes)
        entries = _entries(retriever, images, split, pattern)
        with progress_bar("extracting", console) as show:
            made = retriever.build(index, entries, kind=kind, storage=storage, progress=show)
        if processes.first:
            console.print(f"{len(made)} items of {made.description.dimension} numbers in {index}")


def add(
    index: IndexPath,
    weights: WeightsOption,
    images: ImagesOption = None,
    split: SplitOption = None,
    pattern: PatternsOption = None,
    config: ConfigOption = None,
    overrides: Overrides = None,
) -> None:
    """Append images to an index; what is there is not written again. The weights must be those that made it."""
    with shared_work() as processes:
        retriever = _retriever(weights, index, config, overrides, processes)
        before = len(retriever.index)
        entries = _entries(retriever, images, split, pattern)
        with progress_bar("extracting", console) as show:
            retriever.add(entries, progress=show)
        if processes.first:
            console.print(f"{len(retriever.index) - before} items added to {index}, which holds {len(retriever.index)}")


def info(
    index: IndexPath,
    check: Annotated[bool, typer.Option(help="Hold every byte against its checksum.")] = True,
) -> None:
    """Show what an index holds, and whether its files are as they were written."""
    opened = Index(index)
    if check:
        opened.check()
    about = opened.description
    counts = [0] * len(about.modalities)
    identities: set[int] = set()
    for entry in opened.entries():
        counts = [count + (source is not None) for count, source in zip(counts, entry.sources, strict=True)]
        identities.add(entry.identity)
    threshold = about.threshold
    rows = {
        "items": len(opened),
        "images": ", ".join(f"{name} {count}" for name, count in zip(about.modalities, counts, strict=True)),
        "known identities": len(identities - {-1}),
        "feature": f"{about.dimension} numbers in {about.storage}",
        "kind": about.kind,
        "segments": len(about.parts),
        "made by weights": about.fingerprint[:12],
        "threshold": "none"
        if threshold is None
        else f"{threshold.score:.4f} at {threshold.false_accept_rate:.3g} false",
        "files": "as they were written" if check else "not checked",
    }
    table = Table(show_header=False, title=escaped(str(index)), title_justify="left")
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console().print(table)


def calibrate(
    index: IndexPath,
    weights: WeightsOption,
    false_accept_rate: Annotated[float, typer.Option(help="Share of pairs of different identities to accept.")] = 1e-3,
    config: ConfigOption = None,
    overrides: Overrides = None,
) -> None:
    """Choose the score from which on `search` accepts an item, on the items of an index whose identity is known."""
    if launched()[1] > 1:
        raise InputError(f"index calibrate runs in one process, got WORLD_SIZE={launched()[1]}")
    threshold = _retriever(weights, index, config, overrides).calibrate(false_accept_rate)
    console.print(
        f"threshold {threshold.score:.4f}: accepts {threshold.false_accept_rate:.3g} of {threshold.impostor_pairs} "
        f"pairs of different identities and {threshold.true_accept_rate:.1%} of {threshold.genuine_pairs} pairs of one"
    )


def search(
    index: IndexPath,
    weights: WeightsOption,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", metavar="MODALITY=FILE", help="The query; once for each modality there is."),
    ] = None,
    images: ImagesOption = None,
    split: SplitOption = None,
    pattern: PatternsOption = None,
    top: Annotated[int, typer.Option(min=1, help="Items for each query.")] = 10,
    output: Annotated[
        Path | None, typer.Option(help="Write the answers to this .json, or as a page of pictures to this .html.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    config: ConfigOption = None,
    overrides: Overrides = None,
) -> None:
    """Find the items most similar to images: of one query, or of all in a directory, a list or a split."""
    with shared_work() as processes:
        if output is not None:
            if output.suffix not in (".json", ".html"):
                raise InputError(f"answers are written to *.json or *.html, got {output.name}")
            check_writable(output)
        retriever = _retriever(weights, index, config, overrides, processes)
        if not len(retriever.index):
            raise InputError(f"{index} has no items to find; `signal-reid index add` puts some into it")
        if image is not None:
            if images is not None or split is not None:
                raise InputError("give one of --image, --images and --split")
            queries = [query_entry(_pairs(image, "--image"), retriever.maker.modalities)]
        else:
            queries = _entries(retriever, images, split, pattern)
        with progress_bar("extracting", console) as show:
            features = retriever.features_of(queries, show)
        hits = retriever.index.search(features, top, processes)
        if processes.first:
            _show(retriever, queries, hits, output, as_json)


def extract_images(
    weights: Path,
    output: Path,
    images: Path,
    patterns: list[str] | None,
    config: str | None,
    overrides: list[str] | None,
    processes: Processes,
) -> None:
    """What `extract --images` does: features of unit length, without labels."""
    retriever = _retriever(weights, None, config, overrides, processes)
    entries = _entries(retriever, images, None, patterns)
    with progress_bar("extracting", console) as show:
        features = retriever.features_of(entries, show)
    if not processes.first:
        return
    unknown = torch.full((len(entries),), UNKNOWN)
    save_features(output, FeatureSet(features, unknown, unknown), [entry.name for entry in entries])
    console.print(f"{len(features)} features of {features.shape[1]} numbers in {output}")


def _show(
    retriever: Retriever, queries: Sequence[Entry], hits: Sequence[Sequence[Hit]], output: Path | None, as_json: bool
) -> None:
    answer = _answer(retriever, queries, hits)
    if output is not None and output.suffix == ".html":
        write_search_page(output, retriever.maker.config, retriever.index.description, queries, hits)
    elif output is not None:
        write_atomically(output, json.dumps(answer, indent=2).encode() + b"\n")
    if as_json:
        print(json.dumps(answer, indent=2))
    elif output is None:
        for query, found in zip(queries, hits, strict=True):
            Console().print(_table(query, found))
    if output is not None:
        console.print(f"the {len(hits[0])} nearest items of {len(queries)} queries in {output}")


def _table(query: Entry, hits: Sequence[Hit]) -> Table:
    decided = any(hit.accepted is not None for hit in hits)
    table = Table(title=Text(escaped(query.name)), title_justify="left")
    for name in ("rank", "score", *(["accepted"] if decided else [])):
        table.add_column(name, justify="right")
    table.add_column("name", overflow="fold")
    labels = {
        "identity": [hit.entry.identity_shown for hit in hits],
        "camera": [hit.entry.camera_shown for hit in hits],
    }
    known = {name: column for name, column in labels.items() if any(column)}
    for name in known:
        table.add_column(name, justify="right", overflow="fold")
    for place, hit in enumerate(hits):
        row = [str(hit.rank), f"{hit.score:.4f}", *(["yes" if hit.accepted else "no"] if decided else [])]
        names = (hit.name, *(column[place] for column in known.values()))
        table.add_row(*row, *(Text(escaped(name)) for name in names))
    return table


def _answer(retriever: Retriever, queries: Sequence[Entry], hits: Sequence[Sequence[Hit]]) -> dict[str, Any]:
    """What was found, as JSON holds it."""
    modalities, threshold = retriever.maker.modalities, retriever.index.description.threshold

    def told(entry: Entry) -> dict[str, Any]:
        paths = {name: str(source.path) for name, source in zip(modalities, entry.sources, strict=True) if source}
        identity = {"identity": entry.identity, "identity_name": entry.identity_shown}
        camera = {"camera": entry.camera, "camera_name": entry.camera_shown}
        known = [label for label in (identity, camera) if UNKNOWN not in label.values()]
        return {"name": entry.name, "images": paths, **dict(chain.from_iterable(label.items() for label in known))}

    def scored(hit: Hit) -> dict[str, Any]:
        accepted = {} if hit.accepted is None else {"accepted": hit.accepted}
        return {"rank": hit.rank, "score": hit.score, **accepted, "row": hit.row, **told(hit.entry)}

    return {
        "threshold": None if threshold is None else threshold.score,
        "queries": [
            {**told(query), "results": [scored(hit) for hit in found]}
            for query, found in zip(queries, hits, strict=True)
        ],
    }


def _retriever(
    weights: Path,
    index: Path | None,
    config: str | None,
    overrides: list[str] | None,
    processes: Processes | None = None,
) -> Retriever:
    if index is not None:
        Index(index)  # its faults are found before the weights are read
    shared = {} if processes is None else {"processes": processes}
    retriever = Retriever(weights, index, config, overrides or (), **shared)
    keep_memory(retriever.maker.device)
    return retriever


def _entries(retriever: Retriever, images: Path | None, split: str | None, patterns: list[str] | None) -> list[Entry]:
    """The items that the options name."""
    if (images is None) == (split is None):
        raise InputError("give one of --images and --split, or for a search --image")
    if images is not None:
        named = _pairs(patterns, "--pattern") if patterns else None
        return find_entries(images, retriever.maker.modalities, named)
    dataset = open_configured(retriever.maker.config)
    return entries_of(getattr(dataset, str(split)), dataset)


def _pairs(given: Sequence[str], option: str) -> dict[str, str]:
    """Options of the form NAME=VALUE."""
    pairs: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name or not value or name in pairs:
            wrong = "a modality twice" if name in pairs else "another form"
            raise InputError(f"{option} must be MODALITY=VALUE, each modality once, got {wrong}: {text}")
        pairs[name] = value
    return pairs

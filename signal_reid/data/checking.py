"""Everything that is wrong with a dataset on disk, before a run finds out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from signal_reid.data.decoding import read_sources, threaded
from signal_reid.data.errors import DataError, Problem
from signal_reid.data.layouts import Dataset, Sample, find_layout, scan_dataset
from signal_reid.data.layouts.base import Layout
from signal_reid.data.layouts.options import DEFAULT, Options
from signal_reid.data.progress import ProgressCallback
from signal_reid.runtime.text import is_plain


def check_dataset(
    name: str,
    root: str | Path,
    decode: bool = True,
    progress: ProgressCallback | None = None,
    options: Options = DEFAULT,
) -> list[Problem]:
    """List every problem of a dataset.

    Args:
        name: of the dataset.
        root: see `open_dataset`.
        decode: also read every image.
        progress: called with the samples read and their number.
        options: how the dataset would be opened.

    Returns:
        Errors (what `open_dataset` or training would stop at) and warnings, in a fixed order; empty when all is well.

    Raises:
        DataError: no such dataset name.
    """
    layout = find_layout(name)
    found = scan_dataset(name, root, options)
    dataset = found.dataset
    problems = [
        *found.problems,
        *_unmatched(layout, dataset),
        *_shared_identities(layout, dataset),
        *_odd_names(dataset),
    ]
    if decode:
        samples = list(dict.fromkeys((*found.dataset.train, *found.dataset.evaluation_samples()[0])))
        for unreadable in threaded(_inspect, samples, len(samples), progress):
            problems += unreadable
    return problems


def _inspect(sample: Sample) -> list[Problem]:
    """Read a sample; each of its files is tried although another cannot be read."""
    problems = []
    sizes = set()
    by_file = {source.path: [s for s in sample.sources if s.path == source.path] for source in sample.sources}
    for path, sources in by_file.items():
        try:
            sizes |= {image.size for image in read_sources(sources)}
        except DataError as error:
            problems.append(Problem(path, str(error).removeprefix(f"{path}: ")))
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
        problems.append(Problem(sample.sources[0].path, f"modalities of different sizes ({listed} pixels)", "warning"))
    return problems


def _unmatched(layout: Layout, dataset: Dataset) -> Iterator[Problem]:
    """Identities with queries that no gallery image can match under the dataset's protocol."""
    queries = Counter(sample.identity for sample in dataset.query)
    protocol = layout.protocol if dataset.num_cameras else "none"
    lost = Counter(sample.identity for sample in dataset.queries_without_match(protocol))
    elsewhere = f"from another {protocol}" if protocol != "none" else "besides themselves"
    for identity, count in sorted(lost.items()):
        yield Problem(
            dataset.root / layout.query,
            f"identity {identity}: {count} of {queries[identity]} queries have no match in the gallery {elsewhere}",
            "warning",
        )


def _shared_identities(layout: Layout, dataset: Dataset) -> Iterator[Problem]:
    """Identities that are trained on and tested with."""
    shared = set(dataset.train_labels) & {sample.identity for sample in (*dataset.query, *dataset.gallery)}
    if shared:
        listed = ", ".join(map(str, sorted(shared)[:5])) + (", ..." if len(shared) > 5 else "")
        message = f"{len(shared)} identities are also in query or gallery ({listed})"
        yield Problem(dataset.root / layout.train, message, "warning")


def _odd_names(dataset: Dataset) -> Iterator[Problem]:
    """Files whose names other programs may not open or show; this one does, with what cannot be seen escaped."""
    samples = (*dataset.train, *dataset.query, *dataset.gallery)
    for path in sorted({source.path for sample in samples for source in sample.sources}):
        name = str(path.relative_to(dataset.root)) if path.is_relative_to(dataset.root) else str(path)
        if not is_plain(name):
            bytes_of_no_text = any("\ud800" <= character <= "\udfff" for character in name)
            what = "is not UTF-8" if bytes_of_no_text else "has control characters"
            yield Problem(path, f"name {what}", "warning")

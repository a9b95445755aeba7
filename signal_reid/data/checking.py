"""Everything that is wrong with a dataset on disk, before a run finds out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from signal_reid.data.decoding import develop_sources, threaded
from signal_reid.data.errors import DataError, Problem
from signal_reid.data.images import TRAITS, UnfitImageError
from signal_reid.data.layouts import IMAGE_SUFFIXES, Dataset, Sample, find_layout, scan_dataset
from signal_reid.data.layouts.base import UNPAIRED, Layout, Scan, is_junk
from signal_reid.data.layouts.options import DEFAULT, Options
from signal_reid.data.progress import ProgressCallback
from signal_reid.runtime.text import is_plain

SHOWN = 3
"""Names that a problem of many files shows."""


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
        *_in_short(dataset, found.problems),
        *_left_out(layout, found),
        *_unmatched(layout, dataset),
        *_shared_identities(layout, dataset),
        *_odd_names(dataset),
    ]
    if decode:
        samples = list(dict.fromkeys((*dataset.train, *dataset.evaluation_samples()[0])))
        findings: list[_Finding] = []
        for of_sample in threaded(_inspect, samples, progress):
            findings += of_sample
        problems += _summarised(dataset, findings)
    return problems


class _Finding(NamedTuple):
    """What was found when an image was read."""

    path: Path
    message: str
    kind: str = ""
    """Findings of one kind become one problem."""
    severity: Literal["error", "warning"] = "warning"


def _inspect(sample: Sample) -> list[_Finding]:
    """Read a sample; each of its files is tried although another cannot be read."""
    findings = []
    sizes = set()
    by_file = {source.path: [s for s in sample.sources if s.path == source.path] for source in sample.sources}
    for path, sources in by_file.items():
        try:
            developed = develop_sources(sources)
        except UnfitImageError as error:
            findings.append(_Finding(path, error.reason, error.kind, "error"))
        except DataError as error:
            findings.append(_Finding(path, str(error).removeprefix(f"{path}: "), severity="error"))
        else:
            sizes |= {image.size for image, _ in developed}
            findings += [_Finding(path, TRAITS[trait], trait) for trait in developed[0].traits]
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
        findings.append(_Finding(sample.sources[0].path, f"modalities of different sizes ({listed} pixels)", "sizes"))
    return findings


def _summarised(dataset: Dataset, findings: Iterable[_Finding]) -> Iterator[Problem]:
    """Findings as problems: one for each kind, with a count and the first three names."""
    kinds: dict[str, list[_Finding]] = {}
    for finding in findings:
        if finding.kind:
            kinds.setdefault(finding.kind, []).append(finding)
        else:
            yield Problem(finding.path, finding.message, finding.severity)
    for kind, alike in kinds.items():
        paths, first = list(dict.fromkeys(finding.path for finding in alike)), alike[0]
        if len(paths) == 1:
            yield Problem(first.path, first.message, first.severity, kind=kind)
        else:
            yield _counted(dataset, paths, first.message, first.severity, kind)


def _counted(
    dataset: Dataset, paths: Sequence[Path], message: str, severity: Literal["error", "warning"], kind: str = ""
) -> Problem:
    names = [os.path.relpath(path, dataset.directory).replace(os.sep, "/") for path in paths[:SHOWN]]
    listed = ", ".join(names) + (", ..." if len(paths) > SHOWN else "")
    count = f"{len(paths)} files" if len(paths) > 1 else "1 file"
    return Problem(dataset.root, f"{count} {message}: {listed}", severity, kind=kind)


def _in_short(dataset: Dataset, problems: Sequence[Problem]) -> list[Problem]:
    """Problems as they are, but for those that `data.unpaired=skip` made warnings: more than three are one."""
    skipped = [problem for problem in problems if problem.kind == UNPAIRED and problem.severity == "warning"]
    if len(skipped) <= SHOWN or dataset.root.is_file():  # a manifest names each line
        return list(problems)
    rest = [problem for problem in problems if problem not in skipped]
    message = "without a counterpart in another modality, or beside another of the name; left out (data.unpaired=skip)"
    files = list(dict.fromkeys(path for problem in skipped for path in problem.files))
    return [*rest, _counted(dataset, files, message, "warning", UNPAIRED)]


def _left_out(layout: Layout, found: Scan) -> Iterator[Problem]:
    """Files below the directories of the splits that belong to no sample, and of which no problem tells."""
    dataset = found.dataset
    if layout.scan_file is not None or not dataset.root.is_dir():
        return
    told = {path for problem in found.problems for path in (problem.path, *problem.files)}
    kinds: dict[str, list[Path]] = {}
    for path in _files_below([dataset.root / folder for folder in layout.folders]):
        if path in found.files or path in told or any(parent in told for parent in path.parents):
            continue
        if path.is_symlink() and not path.exists():
            kinds.setdefault("linked to what is not there", []).append(path)
        elif not path.name.lower().endswith(IMAGE_SUFFIXES):
            kinds.setdefault(f"no images by their suffix ({', '.join(IMAGE_SUFFIXES)})", []).append(path)
        else:
            kinds.setdefault(f"not where {layout.name} has images, or named as junk", []).append(path)
    for message, paths in kinds.items():
        yield _counted(dataset, paths, f"left out, {message}", "warning")


def _files_below(folders: Iterable[Path]) -> Iterator[Path]:
    """All files but junk, sorted within each directory."""
    for folder in folders:
        for directory, below, names in os.walk(folder, followlinks=True):
            below[:] = sorted(name for name in below if not is_junk(name))
            yield from (Path(directory, name) for name in sorted(names) if not is_junk(name))


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

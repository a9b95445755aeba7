"""Writes manifests: from a data set in a known layout, and with other splits; `layouts/manifest.py` reads them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from signal_reid.data.errors import DataError
from signal_reid.data.layouts import NO_CAMERA, NO_SCENE, Dataset, ImageSource, Sample
from signal_reid.data.layouts.manifest import KNOWN
from signal_reid.data.tables import Row, Table, read_table, write_table
from signal_reid.runtime.files import is_stream


def write_manifest(dataset: Dataset, path: Path) -> int:
    """List a data set's samples in a file that `data.dataset=manifest` reads.

    Samples that are both query and gallery are listed once, as `test`. Paths are told from the file's directory; they
    are absolute where it is a stream, such as /dev/stdout, which lies in none.

    Args:
        dataset: any.
        path: a CSV file, or a Parquet file by its suffix.

    Returns:
        The number of lines below the first.

    Raises:
        OSError: the file cannot be written.
        InputError: Parquet, and pyarrow is not installed.
    """
    samples = (*dataset.train, *dataset.query, *dataset.gallery)
    optional = {
        "camera": any(sample.camera != NO_CAMERA for sample in samples),
        "scene": any(sample.scene != NO_SCENE for sample in samples),
    }
    extra = [name for name, known in optional.items() if known]
    directory = None if is_stream(path) else Path(os.path.abspath(path)).parent
    rows = [
        [split, str(sample.identity), *(str(getattr(sample, name)) for name in extra), *_paths(sample, directory)]
        for split, sample in _listed(dataset)
    ]
    write_table(path, ["split", "identity", *extra, *dataset.modalities], rows)
    return len(rows)


def split_manifest(path: Path, output: Path, test: float = 0.5, queries: int = 1, seed: int = 0) -> dict[str, int]:
    """Write a manifest again with splits that share no identity, drawn from a seed.

    Args:
        path: a manifest; what its column `split` says, if there is one, is overwritten.
        output: the file to write; its paths are told from its own directory, and are absolute where it is a stream.
        test: share of the identities that query and gallery are made of, the others are for training.
        queries: of each test identity in each camera (where there is a column `camera`), so many samples are queries
            and the others gallery; 0: all of them are both (`test`).
        seed: the same gives the same splits of the same identities, in whatever order the lines are.

    Returns:
        The number of lines by what they say in `split`.

    Raises:
        DataError: fewer than 2 training identities, no test identity or no gallery would be left, a line that is no
            row, or an argument out of its range.
        InputError, OSError: see `read_table` and `write_table`.
    """
    if not 0 < test < 1:
        raise DataError(f"test must be a share between 0 and 1, got {test}")
    if queries < 0:
        raise DataError(f"queries must be at least 0, got {queries}")
    table = read_table(path)
    _check(path, table)
    chosen = _draw({row.cells["identity"] for row in table.rows}, test, seed, path)
    said = dict(zip((row.line for row in table.rows), _said(table.rows, chosen, queries, seed), strict=True))
    if queries and "gallery" not in said.values():
        most = f"no identity to test with has more than {queries} of a camera"
        raise DataError(f"{path}: no line is left for the gallery ({most}); queries 0 makes all of them both")
    columns = ["split", *(name for name in table.columns if name != "split")]
    modalities = [name for name in table.columns if name not in KNOWN]
    here, there = path.absolute().parent, None if is_stream(output) else output.absolute().parent
    rows = []
    for row in table.rows:
        cells = {**row.cells, "split": said[row.line]}
        if here != there:
            cells |= {name: _moved(row.cells[name], here, there) for name in modalities}
        rows.append([cells[name] for name in columns])
    write_table(output, columns, rows)
    counts = list(said.values())
    return {name: counts.count(name) for name in ("train", "query", "gallery", "test") if name in counts}


def _check(path: Path, table: Table) -> None:
    if "identity" not in table.columns:
        raise DataError(f"{path}: there is no column 'identity'")
    problems = [*table.problems, *((r.line, "identity is empty") for r in table.rows if not r.cells["identity"])]
    if problems:
        line, what = min(problems)
        raise DataError(f"{path}: line {line}: {what}")


def _draw(identities: set[str], share: float, seed: int, path: Path) -> set[str]:
    """The test identities."""
    ordered = sorted(identities)
    count = max(1, round(share * len(ordered)))
    if len(ordered) - count < 2:
        raise DataError(f"{path}: at least 2 identities to train on and 1 to test with are needed, got {len(ordered)}")
    return {ordered[index] for index in np.random.default_rng(seed).permutation(len(ordered))[:count]}


def _said(rows: Sequence[Row], test: set[str], queries: int, seed: int) -> Iterator[str]:
    """What each line says in `split`."""
    places: dict[tuple[str, str], list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault((row.cells["identity"], row.cells.get("camera", "")), []).append(index)
    asking: set[int] = set()
    for number, place in enumerate(sorted(places)):
        by_content = sorted(places[place], key=lambda index: sorted(rows[index].cells.items()))
        order = np.random.default_rng([seed, number]).permutation(len(by_content))
        asking.update(by_content[index] for index in order[:queries])
    for index, row in enumerate(rows):
        if row.cells["identity"] not in test:
            yield "train"
        else:
            yield "test" if not queries else "query" if index in asking else "gallery"


def _listed(dataset: Dataset) -> Iterator[tuple[str, Sample]]:
    both = {sample.sources for sample in dataset.query} & {sample.sources for sample in dataset.gallery}
    yield from (("train", sample) for sample in dataset.train)
    yield from (("test" if sample.sources in both else "query", sample) for sample in dataset.query)
    yield from (("gallery", sample) for sample in dataset.gallery if sample.sources not in both)


def _paths(sample: Sample, directory: Path | None) -> list[str]:
    return [_told(source, directory) for source in sample.sources]


def _told(source: ImageSource, directory: Path | None) -> str:
    path = _from(directory, source.path)
    if source.box is None:
        return path
    left, upper, right, lower = source.box
    return f"{path}#xywh={left},{upper},{right - left},{lower - upper}"


def _moved(text: str, here: Path, there: Path | None) -> str:
    """A path told from another directory; the part of an image after # stays what it is."""
    return _from(there, here / text) if text else ""


def _from(directory: Path | None, path: Path) -> str:
    """A path as it is told from a directory, or an absolute one."""
    absolute = os.path.abspath(path)
    return (absolute if directory is None else os.path.relpath(absolute, directory)).replace(os.sep, "/")

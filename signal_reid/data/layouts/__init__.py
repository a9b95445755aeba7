"""Data sets as they lie on disk: a data set is a file here, or an installed plug-in's, and nothing else names it."""

from __future__ import annotations

import logging
from pathlib import Path

from signal_reid.data.errors import DataError, Problem
from signal_reid.data.layouts.base import (
    IMAGE_SUFFIXES,
    NO_CAMERA,
    NO_SCENE,
    SPLITS,
    UNNAMED,
    UNPAIRED,
    Dataset,
    ImageSource,
    Layout,
    Sample,
    Scan,
    Shot,
    SyntheticTwin,
    locate,
    scan,
)
from signal_reid.data.layouts.options import DEFAULT, Options, Reading
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.registry import Registry
from signal_reid.runtime.text import escaped

_logger = logging.getLogger("signal_reid")

LAYOUTS = Registry("signal_reid.layouts", __name__, "LAYOUT", kind="dataset")
"""Every data set by name: the files of this package and installed plug-ins, whose entry points name a `Layout`."""


def find_layout(name: str) -> Layout:
    """The layout of a data set's name, which may be in upper case, as the authors write it.

    Raises:
        DataError: no layout has that name, or a plug-in's is not what its entry point says.
    """
    name = name if name in LAYOUTS.names() else name.lower()
    try:
        layout = LAYOUTS.get(name)
    except InputError as error:
        raise DataError(str(error)) from error
    if not isinstance(layout, Layout) or layout.name != name:
        found = f"a Layout named {layout.name!r}" if isinstance(layout, Layout) else type(layout).__name__
        raise DataError(f"dataset {name} must be a Layout of that name, got {found}")
    return layout


def locate_dataset(name: str, root: str | Path) -> Path:
    """The dataset's directory under a root; see `open_dataset` for the arguments.

    Raises:
        FileNotFoundError: there is none.
    """
    located = locate(find_layout(name), Path(root).expanduser())
    if isinstance(located, Problem):
        raise located.error()
    return located


def scan_dataset(name: str, root: str | Path, options: Options = DEFAULT) -> Scan:
    """List a dataset's samples and problems without decoding anything; see `open_dataset` for the arguments."""
    return scan(find_layout(name), root, options)


def open_dataset(name: str, root: str | Path, options: Options = DEFAULT) -> Dataset:
    """Open a dataset.

    Args:
        name: one of `LAYOUTS.names()`.
        root: the dataset's directory (the one that holds the splits), or a directory that holds it as `RGBNT201/`,
            `RGBNT100/rgbir/`, `MSVR310/`, or any of these under `data/` or `512/data/`; see `Layout.directories`. The
            file where a file lists the data set, as `manifest` does.
        options: which modalities, what becomes of unpaired files, how images are read; `options_of` makes them from a
            configuration.

    Raises:
        FileNotFoundError: a missing directory.
        DataError: the first problem that `check_dataset` would list as an error.
    """
    found = scan_dataset(name, root, options)
    if found.errors:
        raise found.errors[0].error()
    skipped = [problem for problem in found.problems if problem.kind == UNPAIRED]
    if skipped:
        count = sum(problem.count for problem in skipped)
        _logger.warning("%s", escaped(f"left out, without a counterpart: {count} files, such as {skipped[0].path}"))
    return found.dataset


__all__ = [
    "IMAGE_SUFFIXES",
    "LAYOUTS",
    "NO_CAMERA",
    "NO_SCENE",
    "SPLITS",
    "UNNAMED",
    "Dataset",
    "ImageSource",
    "Layout",
    "Options",
    "Reading",
    "Sample",
    "Scan",
    "Shot",
    "SyntheticTwin",
    "find_layout",
    "locate_dataset",
    "open_dataset",
    "scan_dataset",
]

"""The published datasets as they unpack, one file per layout."""

from __future__ import annotations

from pathlib import Path

from signal_reid.data.errors import Problem
from signal_reid.data.layouts import msvr310, rgbnt100, rgbnt201
from signal_reid.data.layouts.base import (
    IMAGE_SUFFIXES,
    MODALITIES,
    NO_SCENE,
    SPLITS,
    Dataset,
    ImageSource,
    Layout,
    Sample,
    Scan,
    find_layout,
    locate,
    scan,
)

LAYOUTS = (rgbnt201.LAYOUT, rgbnt100.LAYOUT, msvr310.LAYOUT)


def locate_dataset(name: str, root: str | Path) -> Path:
    """The dataset's directory under a root; see `open_dataset` for the arguments.

    Raises:
        FileNotFoundError: there is none.
    """
    located = locate(find_layout(name, LAYOUTS), Path(root).expanduser())
    if isinstance(located, Problem):
        raise located.error()
    return located


def scan_dataset(name: str, root: str | Path) -> Scan:
    """List a dataset's samples and problems without decoding anything; see `open_dataset` for the arguments."""
    return scan(find_layout(name, LAYOUTS), root)


def open_dataset(name: str, root: str | Path) -> Dataset:
    """Open a dataset.

    Args:
        name: `rgbnt201`, `rgbnt100` or `msvr310`.
        root: the dataset's directory (the one that holds the splits), or a directory that holds it as `RGBNT201/`,
            `RGBNT100/rgbir/`, `MSVR310/`, or any of these under `data/` or `512/data/`.

    Raises:
        FileNotFoundError: a missing directory.
        DataError: the first problem that `check_dataset` would list as an error.
    """
    found = scan_dataset(name, root)
    if found.errors:
        raise found.errors[0].error()
    return found.dataset


__all__ = [
    "IMAGE_SUFFIXES",
    "LAYOUTS",
    "MODALITIES",
    "NO_SCENE",
    "SPLITS",
    "Dataset",
    "ImageSource",
    "Layout",
    "Sample",
    "Scan",
    "find_layout",
    "locate_dataset",
    "open_dataset",
    "scan_dataset",
]

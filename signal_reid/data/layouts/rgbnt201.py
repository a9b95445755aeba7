"""RGBNT201 (persons): `train_171/` and `test/`, each with `RGB/ NI/ TI/` holding the same names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from signal_reid.data.errors import Problem
from signal_reid.data.layouts.base import MODALITIES, Labels, Layout, Sample, paired_samples

_NAME = re.compile(r"(\d{6})_cam([1-9])(?!\d)")


def parse(name: str) -> Labels | None:
    """Identity and camera index of a file name such as `000288_cam1_0_09.jpg`."""
    match = _NAME.match(name)
    return Labels(int(match[1]), int(match[2]) - 1) if match else None


def scan_split(directory: Path) -> Iterator[Sample | Problem]:
    """The samples and problems of one split."""
    folders = [directory / modality for modality in MODALITIES]
    yield from paired_samples(folders, parse, "NNNNNN_camC_* with C from 1 to 9")


LAYOUT = Layout(
    name="rgbnt201",
    directories=("RGBNT201", "data/RGBNT201", "512/data/RGBNT201"),
    train="train_171",
    query="test",
    gallery="test",
    protocol="camera",
    scan_split=scan_split,
)

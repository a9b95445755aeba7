"""RGBN300 (vehicles): RGBNT100's directories and names, composites of 512x128 pixels, RGB | NI of 256x128 each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL.Image import Image

from signal_reid.data.errors import Problem
from signal_reid.data.layouts.base import Layout, Sample, Shot, SyntheticTwin
from signal_reid.data.layouts.rgbnt100 import BOXES, camera_name, composite_files, composite_samples


def scan_split(directory: Path) -> Iterator[Sample | Problem]:
    """The samples and problems of one split; names that start with -1 are junk and left out."""
    yield from composite_samples(directory, BOXES[:2])


def synthetic_files(shot: Shot, pictures: Sequence[Image]) -> dict[str, Image]:
    """One composite; queries stay in the gallery."""
    return composite_files(shot, pictures, BOXES[:2])


LAYOUT = Layout(
    name="rgbn300",
    modalities=("RGB", "NI"),
    directories=("rgbir", "RGBN300/rgbir", "RGBNT300/rgbir", "data/RGBN300/rgbir", "RGBN300"),
    train="bounding_box_train",
    query="query",
    gallery="bounding_box_test",
    protocol="camera",
    scan_split=scan_split,
    camera_name=camera_name,
    twin=SyntheticTwin(
        subject="vehicle",
        most_identities=600,
        most_cameras=8,
        image_size=(128, 256),
        files=synthetic_files,
        fixed_size=True,
    ),
)

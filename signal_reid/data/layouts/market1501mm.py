"""Market1501-MM (persons): `train/ query/ gallery/` with `RGB/ NI/ TI/` of the same names; NI and TI are generated."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL.Image import Image

from signal_reid.data.errors import Problem
from signal_reid.data.layouts.base import Labels, Layout, Sample, Shot, SyntheticTwin, paired_samples

MODALITIES = ("RGB", "NI", "TI")
"""The modalities, and the directories that hold their images."""

JUNK = -1
"""The identity of boxes that Market1501 says show no one."""

_NAME = re.compile(r"(-1|\d{4})_c([1-9])(?!\d)")


def parse(name: str) -> Labels | None:
    """Identity and camera index of a file name such as `0002_c1s1_000451_03.jpg`; identity 0 are distractors."""
    match = _NAME.match(name)
    return Labels(int(match[1]), int(match[2]) - 1) if match else None


def camera_name(camera: int) -> str:
    """What file names call a camera: `c1` is camera 0."""
    return f"c{camera + 1}"


def scan_split(directory: Path, asked: Sequence[str] = MODALITIES) -> Iterator[Sample | Problem]:
    """The samples and problems of one split; only the modalities asked for have to be there. Identity -1 is junk."""
    folders = [directory / modality for modality in MODALITIES]
    needed = [modality in asked for modality in MODALITIES]
    for item in paired_samples(folders, parse, "NNNN_cC* with C from 1 to 9, or -1_cC* for junk", needed=needed):
        if not isinstance(item, Sample) or item.identity != JUNK:
            yield item


def synthetic_files(shot: Shot, pictures: Sequence[Image]) -> dict[str, Image]:
    """A picture for each modality; a query is not in the gallery, as in Market1501."""
    folder = "train" if shot.split == "train" else "query" if shot.is_query else "gallery"
    name = f"{shot.identity:04d}_c{shot.camera}s1_{shot.number:06d}_00.jpg"
    return {f"{folder}/{modality}/{name}": picture for modality, picture in zip(MODALITIES, pictures, strict=True)}


LAYOUT = Layout(
    name="market1501mm",
    modalities=MODALITIES,
    directories=("Market1501-MM", "Market-MM", "data/Market1501-MM"),
    train="train",
    query="query",
    gallery="gallery",
    protocol="camera",
    scan_split=scan_split,
    camera_name=camera_name,
    scan_asked=scan_split,
    twin=SyntheticTwin(
        subject="person",
        most_identities=9_999,
        most_cameras=6,
        image_size=(128, 64),
        files=synthetic_files,
        queries_apart=True,
    ),
)

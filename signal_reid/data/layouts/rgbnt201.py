"""RGBNT201 (persons): `train_171/` and `test/`, each with `RGB/ NI/ TI/` holding the same names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL.Image import Image

from signal_reid.data.errors import Problem
from signal_reid.data.layouts.base import Labels, Layout, Sample, Shot, SyntheticTwin, paired_samples

MODALITIES = ("RGB", "NI", "TI")
"""The modalities, and the directories that hold their images."""

_NAME = re.compile(r"(\d{6})_cam([1-9])(?!\d)")


def parse(name: str) -> Labels | None:
    """Identity and camera index of a file name such as `000288_cam1_0_09.jpg`."""
    match = _NAME.match(name)
    return Labels(int(match[1]), int(match[2]) - 1) if match else None


def camera_name(camera: int) -> str:
    """What file names call a camera: `cam1` is camera 0."""
    return f"cam{camera + 1}"


def scan_split(directory: Path, asked: Sequence[str] = MODALITIES) -> Iterator[Sample | Problem]:
    """The samples and problems of one split; only the modalities asked for have to be there."""
    folders = [directory / modality for modality in MODALITIES]
    needed = [modality in asked for modality in MODALITIES]
    yield from paired_samples(folders, parse, "NNNNNN_camC_* with C from 1 to 9", needed=needed)


def synthetic_files(shot: Shot, pictures: Sequence[Image]) -> dict[str, Image]:
    """A picture for each modality; query and gallery are one split, as in the published set."""
    folder = "train_171" if shot.split == "train" else "test"
    name = f"{shot.identity:06d}_cam{shot.camera}_{shot.number:04d}.jpg"
    return {f"{folder}/{modality}/{name}": picture for modality, picture in zip(MODALITIES, pictures, strict=True)}


LAYOUT = Layout(
    name="rgbnt201",
    modalities=MODALITIES,
    directories=("RGBNT201", "data/RGBNT201", "512/data/RGBNT201"),
    train="train_171",
    query="test",
    gallery="test",
    protocol="camera",
    scan_split=scan_split,
    camera_name=camera_name,
    scan_asked=scan_split,
    twin=SyntheticTwin(
        subject="person", most_identities=999_999, most_cameras=9, image_size=(256, 128), files=synthetic_files
    ),
)

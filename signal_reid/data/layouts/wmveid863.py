"""WMVeID863 (vehicles): a directory per identity, each with `vis/ ni/ th/`; not every image is there in all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL.Image import Image

from signal_reid.data.errors import Problem
from signal_reid.data.layouts.base import NO_SCENE, Labels, Layout, Sample, Shot, SyntheticTwin
from signal_reid.data.layouts.msvr310 import FOLDERS, MODALITIES, camera_name, identity_samples

_VIEW = re.compile(r"(?<![a-z])v(\d)(?!\d)")
_SCENE = re.compile(r"(?<![a-z])s(\d{3})(?!\d)")


def scan_split(directory: Path, asked: Sequence[str] = MODALITIES) -> Iterator[Sample | Problem]:
    """The samples and problems of one split; only the modalities asked for have to be there."""
    yield from identity_samples(directory, parse, "v and the digit of the view, such as v1_n0_s003_001.jpg", asked)


def parse(name: str, identity: int) -> Labels | None:
    """View (kept as the camera index) and, where it is named, scene of a file name such as `v1_n0_s003_001.jpg`."""
    view, scene = _VIEW.search(name), _SCENE.search(name)
    return Labels(identity, int(view[1]), int(scene[1]) if scene else NO_SCENE) if view else None


def synthetic_files(shot: Shot, pictures: Sequence[Image]) -> dict[str, Image]:
    """A picture for each modality, and one without a counterpart for each identity; queries stay in the gallery."""
    folders = ["train"] if shot.split == "train" else ["test", "query"] if shot.is_query else ["test"]
    name = f"v{shot.camera - 1}_n{shot.number % 2}_s{shot.camera:03d}_{shot.number:03d}.jpg"
    files = {
        f"{folder}/{shot.identity:04d}/{modality}/{name}": picture
        for folder in folders
        for modality, picture in zip(FOLDERS, pictures, strict=True)
    }
    if shot.split == "train" and shot.number == 0:
        files[f"train/{shot.identity:04d}/vis/v{shot.camera - 1}_n0_s{shot.camera:03d}_unpaired.jpg"] = pictures[0]
    return files


LAYOUT = Layout(
    name="wmveid863",
    modalities=MODALITIES,
    directories=("WMVeID863", "WMVEID863", "data/WMVeID863"),
    train="train",
    query="query",
    gallery="test",
    protocol="camera",
    scan_split=scan_split,
    camera_name=camera_name,
    scan_asked=scan_split,
    twin=SyntheticTwin(
        subject="vehicle", most_identities=9_999, most_cameras=8, image_size=(128, 256), files=synthetic_files
    ),
    unpaired="skip",
)

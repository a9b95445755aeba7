"""MSVR310 (vehicles): a directory per identity, each with `vis/ ni/ th/` holding the same names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from PIL.Image import Image

from signal_reid.data.errors import Problem
from signal_reid.data.layouts.base import Labels, Layout, Sample, Shot, SyntheticTwin, is_junk, paired_samples

MODALITIES = ("RGB", "NI", "TI")
FOLDERS = ("vis", "ni", "th")
"""The directories that hold their images."""
_NAME = re.compile(r"(\d{4})..(\d{3})..([0-7])")


def parse(name: str, identity: int = 0) -> Labels | None:
    """Identity, view (kept as the camera index) and scene of a file name such as `0001_s002_v3_004.jpg`."""
    match = _NAME.match(name)
    return Labels(identity=int(match[1]), camera=int(match[3]), scene=int(match[2])) if match else None


def camera_name(camera: int) -> str:
    """What file names call a camera, which is the view: `v0` is camera 0."""
    return f"v{camera}"


def scan_split(directory: Path, asked: Sequence[str] = MODALITIES) -> Iterator[Sample | Problem]:
    """The samples and problems of one split; only the modalities asked for have to be there."""
    yield from identity_samples(directory, parse, "NNNN_sSSS_vV* with V from 0 to 7", asked)


def identity_samples(
    directory: Path, parse: Callable[..., Labels | None], expected: str, asked: Sequence[str] = MODALITIES
) -> Iterator[Sample | Problem]:
    """The samples and problems of a split that has a directory per identity, with one per modality in it.

    Args:
        directory: of the split.
        parse: what a file name says in the directory of an identity, or None when it does not parse.
        expected: the file names that parse, in words.
        asked: the modalities that have to be there.
    """
    needed = [modality in asked for modality in MODALITIES]
    for identity in sorted(path for path in directory.iterdir() if path.is_dir() and not is_junk(path.name)):
        if not identity.name.isdecimal():
            yield Problem(identity, "unexpected directory, expected the number of an identity")
            continue
        number = int(identity.name)
        folders = [identity / folder for folder in FOLDERS]
        items = list(paired_samples(folders, partial(parse, identity=number), expected, f"{identity.name}/", needed))
        if not items:
            yield Problem(identity, "no images of this identity", "warning")
        yield from items
        strangers = {item.identity for item in items if isinstance(item, Sample)} - {number}
        for stranger in sorted(strangers):
            yield Problem(identity, f"holds images named for identity {stranger:04d}", "warning")


def synthetic_files(shot: Shot, pictures: Sequence[Image]) -> dict[str, Image]:
    """A picture for each modality; as in the published set, queries stay in the gallery."""
    name = f"{shot.identity:04d}_s{shot.camera:03d}_v{shot.number % 8}_{shot.number:04d}.jpg"
    test = ["bounding_box_test", "query3"] if shot.is_query else ["bounding_box_test"]
    return {
        f"{folder}/{shot.identity:04d}/{modality}/{name}": picture
        for folder in (["bounding_box_train"] if shot.split == "train" else test)
        for modality, picture in zip(FOLDERS, pictures, strict=True)
    }


LAYOUT = Layout(
    name="msvr310",
    modalities=MODALITIES,
    directories=("MSVR310", "data/MSVR310", "512/data/MSVR310"),
    train="bounding_box_train",
    query="query3",
    gallery="bounding_box_test",
    protocol="scene",
    scan_split=scan_split,
    camera_name=camera_name,
    scan_asked=scan_split,
    twin=SyntheticTwin(
        subject="vehicle", most_identities=9_999, most_cameras=999, image_size=(128, 256), files=synthetic_files
    ),
)

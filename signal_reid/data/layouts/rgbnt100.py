"""RGBNT100 (vehicles): composites of 768x128 pixels, RGB | NI | TI of 256x128 each, in one directory per split."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from signal_reid.data.errors import Problem
from signal_reid.data.layouts.base import (
    ImageSource,
    Labels,
    Layout,
    Sample,
    Shot,
    SyntheticTwin,
    images_by_stem,
    twice,
    unparsable,
)

Box = tuple[int, int, int, int]
BOXES: tuple[Box, ...] = ((0, 0, 256, 128), (256, 0, 512, 128), (512, 0, 768, 128))
_NAME = re.compile(r"(\d+)_c([1-9]\d*)")


def parse(name: str) -> Labels | None:
    """Identity and camera index of a file name such as `0001_c3_0005.jpg`."""
    match = _NAME.search(name)
    return Labels(int(match[1]), int(match[2]) - 1) if match else None


def camera_name(camera: int) -> str:
    """What file names call a camera: `c1` is camera 0."""
    return f"c{camera + 1}"


def scan_split(directory: Path) -> Iterator[Sample | Problem]:
    """The samples and problems of one split; names that start with -1 are junk and left out."""
    yield from composite_samples(directory, BOXES)


def composite_samples(directory: Path, boxes: Sequence[Box]) -> Iterator[Sample | Problem]:
    """The samples and problems of a directory of composites, named as RGBNT100's are.

    Args:
        directory: of one split.
        boxes: of the modalities, the last in the lower right corner.
    """
    for names in images_by_stem(directory).values():
        if names[0].startswith("-1"):
            continue
        paths = tuple(directory / name for name in names)
        labels = parse(names[0])
        if len(names) > 1:
            yield twice(paths, paths)
        elif labels is None:
            yield unparsable(paths[0], "IDENTITY_cC* with C from 1")
        else:
            sources = tuple(ImageSource(paths[0], box, boxes[-1][2:]) for box in boxes)
            yield Sample(*labels, sources=sources, name=names[0])


def synthetic_files(shot: Shot, pictures: Sequence[Image.Image]) -> dict[str, Image.Image]:
    """One composite; as in the published set, queries stay in the gallery."""
    return composite_files(shot, pictures, BOXES)


def composite_files(shot: Shot, pictures: Sequence[Image.Image], boxes: Sequence[Box]) -> dict[str, Image.Image]:
    """One composite of the first pictures, one for each box."""
    composite = Image.new("RGB", (boxes[-1][2], boxes[-1][3]))
    for picture, box in zip(pictures, boxes, strict=False):
        composite.paste(picture, box)
    name = f"{shot.identity:04d}_c{shot.camera}_{shot.number:04d}.jpg"
    test = ["bounding_box_test", "query"] if shot.is_query else ["bounding_box_test"]
    folders = ["bounding_box_train"] if shot.split == "train" else test
    return {f"rgbir/{folder}/{name}": composite for folder in folders}


LAYOUT = Layout(
    name="rgbnt100",
    modalities=("RGB", "NI", "TI"),
    directories=("rgbir", "RGBNT100/rgbir", "data/RGBNT100/rgbir", "512/data/RGBNT100/rgbir", "RGBNT100"),
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

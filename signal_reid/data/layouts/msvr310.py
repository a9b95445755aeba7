"""MSVR310 (vehicles): a directory per identity, each with `vis/ ni/ th/` holding the same names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from signal_reid.data.errors import Problem
from signal_reid.data.layouts.base import Labels, Layout, Sample, paired_samples

FOLDERS = ("vis", "ni", "th")
_NAME = re.compile(r"(\d{4})..(\d{3})..([0-7])")


def parse(name: str) -> Labels | None:
    """Identity, view (kept as the camera index) and scene of a file name such as `0001_s002_v3_004.jpg`."""
    match = _NAME.match(name)
    return Labels(identity=int(match[1]), camera=int(match[3]), scene=int(match[2])) if match else None


def scan_split(directory: Path) -> Iterator[Sample | Problem]:
    """The samples and problems of one split."""
    for identity in sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if not identity.name.isdecimal():
            yield Problem(identity, "unexpected directory, expected the number of an identity")
            continue
        items = list(
            paired_samples(
                [identity / folder for folder in FOLDERS],
                parse,
                "NNNN_sSSS_vV* with V from 0 to 7",
                prefix=f"{identity.name}/",
            )
        )
        if not items:
            yield Problem(identity, "no images of this identity", "warning")
        yield from items
        strangers = {item.identity for item in items if isinstance(item, Sample)} - {int(identity.name)}
        for stranger in sorted(strangers):
            yield Problem(identity, f"holds images named for identity {stranger:04d}", "warning")


LAYOUT = Layout(
    name="msvr310",
    directories=("MSVR310", "data/MSVR310", "512/data/MSVR310"),
    train="bounding_box_train",
    query="query3",
    gallery="bounding_box_test",
    protocol="scene",
    scan_split=scan_split,
)

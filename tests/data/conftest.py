"""Tiny datasets in the published layouts: identities 1, 2, 3 to train on and 4, 5, 6 to test with, 2 cameras each."""

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from signal_reid.config import Config, load_config

WriteDataset = Callable[..., Path]
TRAIN, TEST = (1, 2, 3), (4, 5, 6)
CAMERAS = (1, 2)
NUMBERS = (0, 1)
SIZE = (16, 32)  # width, height


def picture(key: str, size: tuple[int, int] = SIZE) -> Image.Image:
    """A smooth picture that is another one for every key."""
    random = np.random.default_rng(zlib.crc32(key.encode()))
    small = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BILINEAR)


def _save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)


def _rgbnt201(root: Path) -> list[tuple[Path, Image.Image]]:
    return [
        (path, picture(f"{split}{modality}{path.name}"))
        for split, identities in (("train_171", TRAIN), ("test", TEST))
        for identity in identities
        for camera in CAMERAS
        for number in NUMBERS
        for modality in ("RGB", "NI", "TI")
        for path in [root / split / modality / f"{identity:06d}_cam{camera}_0_{number:02d}.jpg"]
    ]


def _composites(root: Path, width: int = 768) -> list[tuple[Path, Image.Image]]:
    return [
        (
            root / split / f"{identity:04d}_c{camera}_{number:04d}.jpg",
            picture(f"{identity}{camera}{number}", (width, 128)),
        )
        for split, identities in (("bounding_box_train", TRAIN), ("query", TEST), ("bounding_box_test", TEST))
        for identity in identities
        for camera in CAMERAS
        for number in NUMBERS
    ]


def _msvr310(root: Path) -> list[tuple[Path, Image.Image]]:
    return [
        (path, picture(f"{modality}{path.name}"))
        for split, identities in (("bounding_box_train", TRAIN), ("query3", TEST), ("bounding_box_test", TEST))
        for identity in identities
        for scene in CAMERAS
        for number in NUMBERS
        for modality in ("vis", "ni", "th")
        for path in [root / split / f"{identity:04d}" / modality / f"{identity:04d}_s{scene:03d}_v{number}_000.jpg"]
    ]


def _wmveid863(root: Path) -> list[tuple[Path, Image.Image]]:
    return [
        (path, picture(f"{modality}{path.name}"))
        for split, identities in (("train", TRAIN), ("query", TEST), ("test", TEST))
        for identity in identities
        for view in CAMERAS
        for number in NUMBERS
        for modality in ("vis", "ni", "th")
        for path in [root / split / f"{identity:04d}" / modality / f"v{view}_n0_s001_{number:03d}.jpg"]
    ]


def _market1501mm(root: Path) -> list[tuple[Path, Image.Image]]:
    return [
        (path, picture(f"{split}{modality}{path.name}"))
        for split, identities in (("train", TRAIN), ("query", TEST), ("gallery", TEST))
        for identity in identities
        for camera in CAMERAS
        for number in NUMBERS
        for modality in ("RGB", "NI", "TI")
        for path in [root / split / modality / f"{identity:04d}_c{camera}s1_{number:06d}_00.jpg"]
    ]


FILES = {
    "rgbnt201": _rgbnt201,
    "rgbnt100": _composites,
    "msvr310": _msvr310,
    "rgbn300": lambda root: _composites(root, 512),
    "wmveid863": _wmveid863,
    "market1501mm": _market1501mm,
}


@pytest.fixture(scope="session")
def write_dataset() -> WriteDataset:
    """Writes a dataset into a directory, its files in either order; returns the directory."""

    def write(name: str, root: Path, reverse: bool = False) -> Path:
        files = FILES[name](root)
        for path, image in reversed(files) if reverse else files:
            _save(path, image)
        return root

    return write


@pytest.fixture
def rgbnt201(write_dataset: WriteDataset, tmp_path: Path) -> Path:
    return write_dataset("rgbnt201", tmp_path / "RGBNT201")


@pytest.fixture
def rgbnt100(write_dataset: WriteDataset, tmp_path: Path) -> Path:
    return write_dataset("rgbnt100", tmp_path / "RGBNT100" / "rgbir")


@pytest.fixture
def msvr310(write_dataset: WriteDataset, tmp_path: Path) -> Path:
    return write_dataset("msvr310", tmp_path / "MSVR310")


@pytest.fixture
def truncate() -> Callable[[Path], None]:
    """Cuts the end of a file off: of a JPEG, a part of its pixels."""

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-40])

    return cut


@pytest.fixture
def make_config() -> Callable[..., Config]:
    """A configuration of a tiny dataset: batches of 2 identities with 2 images each, no workers."""

    def make(root: Path, dataset: str = "rgbnt201", **data: object) -> Config:
        values = {"dataset": dataset, "root": str(root), "image_size": [32, 16], "batch_size": 4, "instances": 2}
        model = {"selective_interaction": False, "local_alignment": False}
        return load_config({"model": model, "data": {**values, "workers": 0, **data}})

    return make

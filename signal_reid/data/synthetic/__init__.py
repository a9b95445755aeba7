"""Synthetic multi-modal data sets in the published layouts: small, seeded, hard for pixels and learnable in minutes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from PIL import Image

from signal_reid.data.synthetic.identities import generator
from signal_reid.data.synthetic.people import Person
from signal_reid.data.synthetic.scenes import Camera, Framing, photograph
from signal_reid.data.synthetic.vehicles import Vehicle

__all__ = ["Dataset", "synthesize"]

Dataset = Literal["rgbnt201", "rgbnt100", "msvr310"]

JPEG_QUALITY = 90

LIMITS = {"rgbnt201": (999_999, 9), "rgbnt100": (600, 8), "msvr310": (9_999, 999)}
"""What the file names of a layout can count: identities, cameras (scenes for MSVR310)."""


@dataclass(frozen=True)
class _Shot:
    """One triplet to take: the `number`-th picture of an identity, by a camera (or in a scene), from 1."""

    split: str
    identity: int
    number: int
    camera: int
    is_query: bool


def synthesize(
    dataset: Dataset,
    output: Path,
    *,
    train_identities: int = 48,
    test_identities: int = 24,
    images_per_identity: int = 8,
    cameras: int = 4,
    image_size: tuple[int, int] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a synthetic data set that unpacks like the published one; equal arguments give equal bytes.

    Args:
        dataset: whose layout to write; persons for RGBNT201, vehicles for RGBNT100 and MSVR310.
        output: the data set's root; it must not exist, or be an empty directory.
        train_identities: identities to train on.
        test_identities: other identities, for query and gallery.
        images_per_identity: triplets of each identity, spread evenly over the cameras.
        cameras: cameras; for MSVR310, scenes.
        image_size: height, width of a picture in pixels; none: 256 x 128 for persons, 128 x 256 for vehicles, which
            RGBNT100's composites cannot differ from. Other shapes show the same view, stretched.
        seed: of everything drawn.
        progress: called with (triplets written, triplets in all) after each.

    Returns:
        The data set's root, `output`.

    Raises:
        ValueError: an argument that the layout or the evaluation cannot hold.
        FileExistsError: `output` is a file or holds something already.
    """
    output = Path(output)
    size = _check(dataset, output, train_identities, test_identities, images_per_identity, cameras, image_size, seed)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    shots = list(_plan(train_identities, test_identities, images_per_identity, cameras))
    try:
        _write(dataset, partial, shots, size, seed, progress)
        if output.is_dir():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def _check(
    dataset: str,
    output: Path,
    train_identities: int,
    test_identities: int,
    images_per_identity: int,
    cameras: int,
    image_size: tuple[int, int] | None,
    seed: int,
) -> tuple[int, int]:
    if dataset not in get_args(Dataset):
        raise ValueError(f"dataset must be one of {', '.join(get_args(Dataset))}, got {dataset!r}")
    identities, most_cameras = LIMITS[dataset]
    for name, value, low, high in (
        ("train_identities", train_identities, 1, identities - 1),
        ("test_identities", test_identities, 1, identities - train_identities),
        ("images_per_identity", images_per_identity, 2, 9_999),
        ("cameras", cameras, 2, most_cameras),
        ("seed", seed, 0, 2**32 - 1),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} must be in {low}..{high} for {dataset}, got {value}")
    default = (256, 128) if dataset == "rgbnt201" else (128, 256)
    size = default if image_size is None else (int(image_size[0]), int(image_size[1]))
    if dataset == "rgbnt100" and size != default:
        raise ValueError(f"image_size must be (128, 256) for rgbnt100, whose composites are fixed, got {size}")
    if min(size) < 32 or max(size) > 1024:
        raise ValueError(f"image_size must be in 32..1024 on each side, got {size}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"output must be a new or an empty directory, got {output}, which exists")
    return size


def _plan(train_identities: int, test_identities: int, images_per_identity: int, cameras: int) -> Iterator[_Shot]:
    """Every identity passes the cameras in turn; its first picture in each is a query."""
    for identity in range(1, train_identities + test_identities + 1):
        split = "train" if identity <= train_identities else "test"
        for number in range(images_per_identity):
            camera = (identity + number) % cameras + 1
            yield _Shot(split, identity, number, camera, is_query=split == "test" and number < cameras)


def _write(
    dataset: str,
    root: Path,
    shots: list[_Shot],
    size: tuple[int, int],
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    people = dataset == "rgbnt201"
    framing = (
        Framing(size, unit=(2, 1), length=(0.82, 0.92), ground=(0.92, 0.99), sideways=0.08)
        if people
        else Framing(size, unit=(1, 2), length=(0.78, 0.9), ground=(0.8, 0.92), sideways=0.05)
    )
    installed = {number: Camera.install(seed, number, framing) for number in {shot.camera for shot in shots}}
    kind = Person if people else Vehicle
    subjects = {identity: kind.of_identity(seed, identity) for identity in {shot.identity for shot in shots}}
    save = {"rgbnt201": _save_rgbnt201, "rgbnt100": _save_rgbnt100, "msvr310": _save_msvr310}[dataset]
    for done, shot in enumerate(shots, start=1):
        rng = generator(seed, "picture", shot.identity, shot.number)
        save(root, shot, photograph(subjects[shot.identity], installed[shot.camera], framing, rng))
        if progress is not None:
            progress(done, len(shots))


def _save_rgbnt201(root: Path, shot: _Shot, pictures: list[Image.Image]) -> None:
    folder = root / ("train_171" if shot.split == "train" else "test")
    name = f"{shot.identity:06d}_cam{shot.camera}_{shot.number:04d}.jpg"
    for modality, picture in zip(("RGB", "NI", "TI"), pictures, strict=True):
        _save(picture, folder / modality / name)


def _save_rgbnt100(root: Path, shot: _Shot, pictures: list[Image.Image]) -> None:
    width, height = pictures[0].size
    composite = Image.new("RGB", (3 * width, height))
    for column, picture in enumerate(pictures):
        composite.paste(picture, (column * width, 0))
    name = f"{shot.identity:04d}_c{shot.camera}_{shot.number:04d}.jpg"
    for folder in _folders(shot, query="query"):
        _save(composite, root / "rgbir" / folder / name)


def _save_msvr310(root: Path, shot: _Shot, pictures: list[Image.Image]) -> None:
    name = f"{shot.identity:04d}_s{shot.camera:03d}_v{shot.number % 8}_{shot.number:04d}.jpg"
    for folder in _folders(shot, query="query3"):
        for modality, picture in zip(("vis", "ni", "th"), pictures, strict=True):
            _save(picture, root / folder / f"{shot.identity:04d}" / modality / name)


def _folders(shot: _Shot, query: str) -> list[str]:
    """As in the published sets, queries stay in the gallery."""
    if shot.split == "train":
        return ["bounding_box_train"]
    return ["bounding_box_test", query] if shot.is_query else ["bounding_box_test"]


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, "JPEG", quality=JPEG_QUALITY)

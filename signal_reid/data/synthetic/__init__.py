"""Synthetic multi-modal data sets in the published layouts: small, seeded, hard for pixels and learnable in minutes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from signal_reid.data.errors import DataError
from signal_reid.data.layouts import Shot, SyntheticTwin, find_layout
from signal_reid.data.progress import ProgressCallback
from signal_reid.data.synthetic.identities import generator
from signal_reid.data.synthetic.people import Person
from signal_reid.data.synthetic.scenes import Camera, Framing, Subject, photograph
from signal_reid.data.synthetic.vehicles import Vehicle
from signal_reid.runtime.files import may_be_removed, temporary_name
from signal_reid.runtime.spare_memory import require_memory, require_memory_of_codec

__all__ = ["synthesize"]

JPEG_QUALITY = 90
_BYTES_OF_PIXEL = 256  # of a triplet while it is drawn, asked for at once: NumPy does not survive the lack of a buffer

SUBJECTS: dict[str, tuple[Callable[[int, int], Subject], Callable[[tuple[int, int]], Framing]]] = {
    "person": (
        Person.of_identity,
        partial(Framing, unit=(2, 1), length=(0.82, 0.92), ground=(0.92, 0.99), sideways=0.08),
    ),
    "vehicle": (
        Vehicle.of_identity,
        partial(Framing, unit=(1, 2), length=(0.78, 0.9), ground=(0.8, 0.92), sideways=0.05),
    ),
}
"""What can be drawn: how an identity looks, and how it stands in pictures of a size."""


def synthesize(
    dataset: str,
    output: Path,
    *,
    train_identities: int = 48,
    test_identities: int = 24,
    images_per_identity: int = 8,
    cameras: int = 4,
    image_size: tuple[int, int] | None = None,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> Path:
    """Write a synthetic data set that unpacks like the published one; equal arguments give equal bytes.

    Args:
        dataset: whose layout to write; its `SyntheticTwin` says what is drawn and how the files are named.
        output: the data set's root; it must not exist, or be an empty directory.
        train_identities: identities to train on.
        test_identities: other identities, for query and gallery.
        images_per_identity: samples of each identity, spread evenly over the cameras.
        cameras: cameras, or scenes where the protocol compares scenes.
        image_size: height, width of a picture in pixels; none: the twin's, the only one where files are of a fixed
            size. Other shapes show the same view, stretched.
        seed: of everything drawn.
        progress: called with (samples written, samples in all) after each.

    Returns:
        The data set's root, `output`.

    Raises:
        DataError: no such data set, one without a synthetic twin, or an argument that the layout or the evaluation
            cannot hold.
        FileExistsError: `output` is a file or holds something already.
    """
    output = Path(output)
    twin = find_layout(dataset).twin
    if twin is None:
        raise DataError(f"dataset {dataset} cannot be synthesized: its layout has no synthetic twin")
    _check_counts(dataset, twin, train_identities, test_identities, images_per_identity, cameras, seed)
    size = _picture_size(dataset, twin, image_size)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"output must be a new or an empty directory, got {output}, which exists")
    for left in output.parent.glob(".*.tmp"):  # of a process that was killed
        if may_be_removed(left.name, f".{output.name}"):
            shutil.rmtree(left, ignore_errors=True)
    unfinished = output.with_name(temporary_name(f".{output.name}"))
    queries = min(cameras, images_per_identity // 2) if twin.queries_apart else cameras
    shots = list(_plan(train_identities, test_identities, images_per_identity, cameras, queries))
    try:
        _write(twin, unfinished, shots, size, seed, progress)
        if output.is_dir():
            output.rmdir()
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return output


def _check_counts(
    dataset: str,
    twin: SyntheticTwin,
    train_identities: int,
    test_identities: int,
    images_per_identity: int,
    cameras: int,
    seed: int,
) -> None:
    limits = {
        "train_identities": (train_identities, 1, twin.most_identities - 1),
        "test_identities": (test_identities, 1, twin.most_identities - train_identities),
        "images_per_identity": (images_per_identity, 2, 9_999),
        "cameras": (cameras, 2, twin.most_cameras),
        "seed": (seed, 0, 2**32 - 1),
    }
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise DataError(f"{name} must be in {low}..{high} for {dataset}, got {value}")


def _picture_size(dataset: str, twin: SyntheticTwin, asked: tuple[int, int] | None) -> tuple[int, int]:
    size = twin.image_size if asked is None else (int(asked[0]), int(asked[1]))
    if twin.fixed_size and size != twin.image_size:
        raise DataError(
            f"image_size must be {twin.image_size} for {dataset}, whose files are of a fixed size, got {size}"
        )
    if min(size) < 32 or max(size) > 1024:
        raise DataError(f"image_size must be in 32..1024 on each side, got {size}")
    return size


def _plan(
    train_identities: int, test_identities: int, images_per_identity: int, cameras: int, queries: int
) -> Iterator[Shot]:
    """Every identity passes the cameras in turn; its first pictures, of one camera each, are queries."""
    for identity in range(1, train_identities + test_identities + 1):
        test = identity > train_identities
        for number in range(images_per_identity):
            camera = (identity + number) % cameras + 1
            yield Shot("test" if test else "train", identity, number, camera, is_query=test and number < queries)


def _write(
    twin: SyntheticTwin,
    root: Path,
    shots: list[Shot],
    size: tuple[int, int],
    seed: int,
    progress: ProgressCallback | None,
) -> None:
    look, frame = SUBJECTS[twin.subject]
    framing = frame(size)
    installed = {number: Camera.install(seed, number, framing) for number in {shot.camera for shot in shots}}
    subjects = {identity: look(seed, identity) for identity in {shot.identity for shot in shots}}
    for done, shot in enumerate(shots, start=1):
        require_memory(size[0] * size[1] * _BYTES_OF_PIXEL)
        rng = generator(seed, "picture", shot.identity, shot.number)
        pictures = photograph(subjects[shot.identity], installed[shot.camera], framing, rng)
        for name, picture in twin.files(shot, pictures).items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            require_memory_of_codec(*picture.size)
            picture.save(path, "JPEG", quality=JPEG_QUALITY)
        if progress is not None:
            progress(done, len(shots))
    for name, text in (twin.texts(shots) if twin.texts is not None else {}).items():
        (root / name).write_text(text)

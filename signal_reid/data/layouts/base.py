"""The types that all layouts share, and the one scan behind `open_dataset` and `check_dataset`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from signal_reid.data.errors import Problem

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = ("train", "query", "gallery")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
NO_SCENE = -1


@dataclass(frozen=True)
class ImageSource:
    """An image file, or the part of one inside `box` (left, upper, right, lower; pixels)."""

    path: Path
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Sample:
    """Where the images of one moment are, in the order of the layout's modalities, and what is known of it."""

    identity: int
    camera: int
    """Index of the camera (or view) from 0."""
    scene: int
    """-1 where the dataset has no scenes."""
    sources: tuple[ImageSource, ...]
    name: str
    """Unique within the split and the same on every machine."""


@dataclass(frozen=True)
class Dataset:
    """The three splits of a dataset, sorted by name."""

    name: str
    root: Path
    """The directory that holds the splits."""
    train: list[Sample]
    query: list[Sample]
    gallery: list[Sample]
    modalities: tuple[str, ...]
    """Names of a sample's images, in their order."""

    @property
    def num_train_identities(self) -> int:
        return len(self.train_labels)

    @cached_property
    def num_cameras(self) -> int:
        """The largest camera index of any split, plus one."""
        return 1 + max(sample.camera for split in (self.train, self.query, self.gallery) for sample in split)

    @cached_property
    def train_labels(self) -> dict[int, int]:
        """Contiguous class label of each training identity, by sorted identity."""
        return {identity: label for label, identity in enumerate(sorted({s.identity for s in self.train}))}

    def queries_without_match(self, protocol: str) -> list[Sample]:
        """Queries whose identity the gallery does not show from another camera (or scene).

        Args:
            protocol: `camera` or `scene`.
        """
        places: dict[int, set[int]] = {}
        for sample in self.gallery:
            places.setdefault(sample.identity, set()).add(getattr(sample, protocol))
        return [s for s in self.query if not places.get(s.identity, set()) - {getattr(s, protocol)}]

    def evaluation_samples(self) -> tuple[list[Sample], list[int], list[int]]:
        """Query and gallery with what they share listed once.

        Returns:
            The samples, and the positions of the query and of the gallery samples in that list.
        """
        position: dict[Sample, int] = {}
        for sample in (*self.query, *self.gallery):
            position.setdefault(sample, len(position))
        return list(position), [position[s] for s in self.query], [position[s] for s in self.gallery]


class Labels(NamedTuple):
    """What a file name says."""

    identity: int
    camera: int
    scene: int = NO_SCENE


class Shot(NamedTuple):
    """A sample that a synthetic data set is to hold."""

    split: Literal["train", "test"]
    identity: int
    """From 1."""
    number: int
    """Of the identity's samples, from 0."""
    camera: int
    """From 1; a scene where the protocol compares scenes."""
    is_query: bool


@dataclass(frozen=True)
class SyntheticTwin:
    """How `data.synthetic` writes drawn pictures in a layout."""

    subject: Literal["person", "vehicle"]
    """What is drawn."""
    most_identities: int
    """How many identities the file names can count."""
    most_cameras: int
    """How many cameras (or scenes) the file names can count."""
    image_size: tuple[int, int]
    """Height, width of a picture in pixels, unless another size is asked for."""
    files: Callable[[Shot, Sequence[Image]], Mapping[str, Image]]
    """From a shot and its pictures (RGB, near-infrared, thermal) to what is written at which paths below the root."""
    fixed_size: bool = False
    """Whether the layout holds pictures of `image_size` alone."""


@dataclass(frozen=True)
class Layout:
    """How one data set lies on disk: everything that the package knows of it."""

    name: str
    """What the configuration's `data.dataset` says: the name of the layout's file, or of the plug-in's entry point."""
    modalities: tuple[str, ...]
    """Names of a sample's images, in the order of its sources."""
    directories: tuple[str, ...]
    """Where the dataset may lie under a given root, in order of preference."""
    train: str
    query: str
    gallery: str
    protocol: Literal["camera", "scene"]
    """What may not be shared between a query and its match."""
    scan_split: Callable[[Path], Iterator[Sample | Problem]]
    """The samples and problems of one split's directory."""
    twin: SyntheticTwin | None = None
    """How to synthesize it; none: it cannot be synthesized."""

    def folder(self, split: str) -> str:
        return {"train": self.train, "query": self.query, "gallery": self.gallery}[split]

    @property
    def folders(self) -> tuple[str, ...]:
        """The distinct directories of the splits."""
        return tuple(dict.fromkeys((self.train, self.query, self.gallery)))


@dataclass(frozen=True)
class Scan:
    """What was found under a root: the usable samples and every problem, in a fixed order."""

    dataset: Dataset
    problems: list[Problem]

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.severity == "error"]


def scan(layout: Layout, root: str | Path) -> Scan:
    """List a dataset without decoding anything.

    Args:
        layout: how the dataset lies on disk.
        root: the dataset's directory, or one that holds it in a place that `layout.directories` names.
    """
    located = locate(layout, Path(root).expanduser())
    if isinstance(located, Problem):
        return Scan(Dataset(layout.name, Path(root), [], [], [], layout.modalities), [located])
    found: dict[str, list[Sample]] = {}
    problems: list[Problem] = []
    for folder in layout.folders:
        found[folder], folder_problems = _scan_folder(layout, located / folder)
        problems += folder_problems
    splits = (found[layout.train], found[layout.query], found[layout.gallery])
    dataset = Dataset(layout.name, located, *splits, layout.modalities)
    if dataset.train and dataset.num_train_identities < 2:
        problems.append(Problem(located / layout.train, "train needs at least 2 identities, got 1"))
    return Scan(dataset, problems)


def _scan_folder(layout: Layout, folder: Path) -> tuple[list[Sample], list[Problem]]:
    splits = " and ".join(split for split in SPLITS if layout.folder(split) == folder.name)
    if not folder.is_dir():
        return [], [Problem(folder, f"missing directory ({splits} of {layout.name})", missing=True)]
    samples: list[Sample] = []
    problems: list[Problem] = []
    for item in layout.scan_split(folder):
        if isinstance(item, Sample):
            samples.append(item)
        else:
            problems.append(item)
    if not samples and not any(problem.severity == "error" for problem in problems):
        problems.append(Problem(folder, f"no images ({', '.join(IMAGE_SUFFIXES)}) for {splits} of {layout.name}"))
    return samples, problems


def locate(layout: Layout, root: Path) -> Path | Problem:
    """The dataset's directory under a root: of the candidates the one that holds most of the splits."""
    if not root.is_dir():
        return Problem(root, f"no such directory (root of {layout.name})", missing=True)
    candidates = [root, *(root / directory for directory in layout.directories)]
    held = [sum((candidate / folder).is_dir() for folder in layout.folders) for candidate in candidates]
    if max(held) == 0:
        looked_in = ", ".join(str(candidate) for candidate in candidates)
        return Problem(root, f"no {layout.name} dataset here; looked for {layout.train}/ in {looked_in}", missing=True)
    return candidates[held.index(max(held))]


def image_names(folder: Path) -> set[str]:
    """Names of the image files directly in a directory; hidden files are left out."""
    with os.scandir(folder) as entries:
        return {
            entry.name
            for entry in entries
            if not entry.name.startswith(".") and entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file()
        }


def paired_samples(
    folders: Sequence[Path], parse: Callable[[str], Labels | None], expected: str, prefix: str = ""
) -> Iterator[Sample | Problem]:
    """Samples of which each modality has its own directory, paired by file name.

    Args:
        folders: one directory per modality.
        parse: what a file name says, or None when it does not parse.
        expected: the file names that parse, in words.
        prefix: what stands before the file name in the sample's name.
    """
    absent_folders = [folder for folder in folders if not folder.is_dir()]
    if absent_folders:
        yield from (Problem(folder, "missing directory of a modality", missing=True) for folder in absent_folders)
        return
    listed = [image_names(folder) for folder in folders]
    for name in sorted(set[str]().union(*listed)):
        holding = [folder / name for folder, names in zip(folders, listed, strict=True) if name in names]
        if len(holding) < len(folders):
            for folder in folders:
                if folder / name not in holding:
                    yield Problem(folder / name, f"missing modality; {_relative(holding[0])} has no counterpart")
            continue
        labels = parse(name)
        if labels is None:
            yield unparsable(holding[0], expected)
        else:
            yield Sample(*labels, sources=tuple(ImageSource(path) for path in holding), name=prefix + name)


def unparsable(path: Path, expected: str) -> Problem:
    """The problem of a file name that says nothing."""
    return Problem(path, f"name does not parse, expected {expected}")


def _relative(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"

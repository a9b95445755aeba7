"""The types that all layouts share, and the one scan behind `open_dataset` and `check_dataset`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from signal_reid.data.errors import Problem, ProblemList
from signal_reid.data.layouts.options import DEFAULT, PLAIN, Options, Reading, Unpaired
from signal_reid.runtime.text import escaped, shown

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = ("train", "query", "gallery")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
NO_CAMERA = NO_SCENE = -1
UNITS = {1: "images", 2: "pairs", 3: "triplets"}
"""What samples of so many images are called."""
UNNAMED = "n/a"
"""What the camera of a sample is called where the data set knows none."""
MOST_NAMED = 12
"""Cameras whose names stand in a line; of more, the first ones' and the last one's."""


@dataclass(frozen=True)
class ImageSource:
    """An image file, or the part of one inside `box` (left, upper, right, lower; pixels)."""

    path: Path
    box: tuple[int, int, int, int] | None = None
    whole: tuple[int, int] | None = None
    """Width, height that the file must have; none: any that holds the box."""
    reading: Reading = PLAIN


@dataclass(frozen=True)
class Sample:
    """Where the images of one moment are, in the order of the layout's modalities, and what is known of it."""

    identity: int
    camera: int
    """Index of the camera (or view) from 0; -1 where the dataset knows none."""
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
    """The directory that holds the splits, or the file that lists them."""
    train: list[Sample]
    query: list[Sample]
    gallery: list[Sample]
    modalities: tuple[str, ...]
    """Names of a sample's images, in their order."""
    camera_names: Mapping[int, str] = field(default_factory=dict)
    """What the files call each camera that a sample has, by its number, in the order of numbers."""
    identity_names: Mapping[int, str] = field(default_factory=dict)
    """What the files call an identity, by its number, where the number does not say it."""

    @property
    def num_train_identities(self) -> int:
        return len(self.train_labels)

    @property
    def directory(self) -> Path:
        """What the paths of the samples are told from."""
        return self.root.parent if self.root.is_file() else self.root

    @property
    def unit(self) -> str:
        """What its samples are called: images, pairs, triplets, or samples of more modalities."""
        return UNITS.get(len(self.modalities), "samples")

    def camera_name(self, number: int) -> str:
        """What a camera is called wherever a user sees it: as in the files; n/a where no camera is known."""
        return UNNAMED if number == NO_CAMERA else self.camera_names.get(number, str(number))

    @property
    def cameras_in_words(self) -> str:
        """How many cameras the samples have, and their names: `2 cameras (cam1, cam2)`, or `no cameras`."""
        names = list(self.camera_names.values())
        if len(names) > MOST_NAMED:
            names = [*names[: MOST_NAMED - 1], "...", names[-1]]
        counted = f"{len(self.camera_names)} camera{'s' if len(names) > 1 else ''}"
        return f"{counted} ({', '.join(names)})" if names else "no cameras"

    @cached_property
    def num_cameras(self) -> int:
        """The largest camera index of any split, plus one; 0 where the dataset knows none."""
        samples = (*self.train, *self.query, *self.gallery)
        return 1 + max((sample.camera for sample in samples), default=NO_CAMERA)

    @cached_property
    def train_labels(self) -> dict[int, int]:
        """Contiguous class label of each training identity, by sorted identity."""
        return {identity: label for label, identity in enumerate(sorted({s.identity for s in self.train}))}

    def queries_without_match(self, protocol: str) -> list[Sample]:
        """Queries whose identity the gallery does not show from another camera (or scene, or in another sample).

        Args:
            protocol: `camera`, `scene` or `none`.
        """

        def place(sample: Sample) -> object:
            return sample if protocol == "none" else getattr(sample, protocol)

        places: dict[int, set[object]] = {}
        for sample in self.gallery:
            places.setdefault(sample.identity, set()).add(place(sample))
        return [s for s in self.query if not places.get(s.identity, set()) - {place(s)}]

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
    """Place among the identity's samples, from 0."""
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
    queries_apart: bool = False
    """Whether a query is not in the gallery, so that pictures of its identity have to be left for that."""
    fixed_size: bool = False
    """Whether the layout holds pictures of `image_size` alone."""
    texts: Callable[[Sequence[Shot]], Mapping[str, str]] | None = None
    """From all shots to the text files, by path below the root, that the layout has beside its pictures."""


class FileContents(NamedTuple):
    """What a file that lists a data set says."""

    splits: Mapping[str, list[Sample]]
    """Samples by split, for each of `SPLITS`."""
    modalities: tuple[str, ...]
    problems: list[Problem]
    camera_names: Mapping[int, str] | None = None
    """What it calls each camera, by its number; none: `Layout.camera_name` says it."""
    identity_names: Mapping[int, str] = MappingProxyType({})
    """What it calls identities whose number does not say it, by number."""


def counted_from_one(camera: int) -> str:
    """The name of a camera where the files have nothing but a number for it, from 1."""
    return str(camera + 1)


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
    unpaired: Unpaired = "error"
    """What becomes of a file without its other modalities unless `data.unpaired` says otherwise."""
    scan_asked: Callable[[Path, Sequence[str]], Iterator[Sample | Problem]] | None = None
    """As `scan_split`, where only the named modalities have to be there; none: all have to be."""
    scan_file: Callable[[Path, Options], FileContents] | None = None
    """For a data set that a file lists: reads it; the modalities and the directories are empty then."""
    camera_name: Callable[[int], str] = counted_from_one
    """From the number of a camera to what the file names call it; each camera has a name of its own."""

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
    files: frozenset[Path] = frozenset()
    """Files of all samples, also of those and their modalities that the options leave out."""

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.severity == "error"]


def scan(layout: Layout, root: str | Path, options: Options = DEFAULT) -> Scan:
    """List a dataset without decoding anything.

    Args:
        layout: how the dataset lies on disk.
        root: the dataset's directory, or one that holds it in a place that `layout.directories` names; the file where a
            file lists it.
        options: how to open it.
    """
    located = locate(layout, Path(root).expanduser())
    if isinstance(located, Problem):
        return Scan(Dataset(layout.name, Path(root), [], [], [], layout.modalities), [located])
    contents = (layout.scan_file or _file_of_directories(layout))(located, options)
    splits, problems = contents.splits, list(contents.problems)
    chosen = _chosen(contents.modalities, options.modalities, located)
    if isinstance(chosen, Problem):
        return Scan(Dataset(layout.name, located, [], [], [], contents.modalities), [chosen])
    files = frozenset(source.path for split in SPLITS for sample in splits[split] for source in sample.sources)
    splits, unknown = _only_listed(splits, options.queries)
    problems += unknown
    picked = {split: [_pick(sample, chosen, options) for sample in splits[split]] for split in SPLITS}
    train, query, gallery = picked.values()
    cameras = _camera_names(layout, splits, contents.camera_names)
    identities = {number: escaped(name) for number, name in contents.identity_names.items()}
    dataset = Dataset(layout.name, located, train, query, gallery, tuple(chosen), cameras, identities)
    if (options.unpaired or layout.unpaired) == "skip":
        problems = [replace(p, severity="warning") if p.kind == UNPAIRED else p for p in problems]
    problems += _empty(layout, dataset, problems)
    if dataset.train and dataset.num_train_identities < 2:
        problems.append(Problem(located / layout.train, "train needs at least 2 identities, got 1"))
    return Scan(dataset, problems, files)


def _camera_names(layout: Layout, splits: Mapping[str, list[Sample]], told: Mapping[int, str] | None) -> dict[int, str]:
    """The names of the cameras that the samples have, fit to be shown, by number."""
    numbers = sorted({sample.camera for split in SPLITS for sample in splits[split]} - {NO_CAMERA})
    return {number: escaped(layout.camera_name(number) if told is None else told[number]) for number in numbers}


UNPAIRED = "unpaired"
"""The kind of the problems that `data.unpaired=skip` makes warnings."""


def _file_of_directories(layout: Layout) -> Callable[[Path, Options], FileContents]:
    """What `scan_file` would be of a data set whose splits are directories."""

    def scan_folders(root: Path, options: Options) -> FileContents:
        found: dict[str, list[Sample]] = {}
        problems: list[Problem] = []
        for folder in layout.folders:
            found[folder], folder_problems = _scan_folder(layout, root / folder, options.modalities)
            problems += folder_problems
        return FileContents({split: found[layout.folder(split)] for split in SPLITS}, layout.modalities, problems)

    return scan_folders


def _scan_folder(layout: Layout, folder: Path, asked: Sequence[str] | None) -> tuple[list[Sample], list[Problem]]:
    splits = " and ".join(split for split in SPLITS if layout.folder(split) == folder.name)
    if not folder.is_dir():
        return [], [Problem(folder, f"missing directory ({splits} of {layout.name})", missing=True)]
    samples: list[Sample] = []
    problems: list[Problem] = []
    items = (
        layout.scan_split(folder) if asked is None or layout.scan_asked is None else layout.scan_asked(folder, asked)
    )
    for item in items:
        if isinstance(item, Sample):
            samples.append(item)
        else:
            problems.append(item)
    return samples, problems


def _only_listed(
    splits: Mapping[str, list[Sample]], listed: str | None
) -> tuple[Mapping[str, list[Sample]], list[Problem]]:
    """The query split with the samples alone that a list names, and the lines of the list that name none."""
    if listed is None:
        return splits, []
    path = Path(listed).expanduser()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()]
    except FileNotFoundError:
        return splits, [Problem(path, "no such file (data.queries)", missing=True)]
    known, named = {sample.name for sample in splits["query"]}, {line for line in lines if line}
    problems = ProblemList(path)
    for number, line in enumerate(lines, start=1):
        if line and line not in known:
            problems.add(f"line {number}: no sample of query is named {shown(line)}")
    return {**splits, "query": [sample for sample in splits["query"] if sample.name in named]}, problems.listed()


def _empty(layout: Layout, dataset: Dataset, problems: Sequence[Problem]) -> list[Problem]:
    """Splits without a sample where no error says why."""
    errors = [problem.path for problem in problems if problem.severity == "error"]
    found: dict[Path, list[str]] = {}
    for split in SPLITS:
        if not getattr(dataset, split):
            found.setdefault(dataset.root / layout.folder(split), []).append(split)
    what = "line" if layout.scan_file else f"images ({', '.join(IMAGE_SUFFIXES)})"
    return [
        Problem(path, f"no {what} for {' and '.join(splits)} of {layout.name}")
        for path, splits in found.items()
        if not any(error.is_relative_to(path) for error in errors)
    ]


def _chosen(names: tuple[str, ...], asked: tuple[str, ...] | None, path: Path) -> dict[str, int] | Problem:
    """The modalities to use and where they stand in a sample."""
    unknown = [name for name in asked or () if name not in names]
    if unknown:
        return Problem(path, f"data.modalities must be of {', '.join(names)}, got {unknown[0]!r}")
    return {name: names.index(name) for name in asked or names}


def _pick(sample: Sample, chosen: Mapping[str, int], options: Options) -> Sample:
    sources = tuple(_read_as(sample.sources[place], options.reading(name)) for name, place in chosen.items())
    return sample if sources == sample.sources else replace(sample, sources=sources)


def _read_as(source: ImageSource, reading: Reading) -> ImageSource:
    return source if source.reading == reading else replace(source, reading=reading)


def locate(layout: Layout, root: Path) -> Path | Problem:
    """The dataset's directory under a root, of the candidates the one that holds most of the splits; or its file."""
    if layout.scan_file is not None:
        return root if root.is_file() else Problem(root, f"no such file (of {layout.name})", missing=True)
    if not root.is_dir():
        return Problem(root, f"no such directory (root of {layout.name})", missing=True)
    candidates = [root, *(root / directory for directory in layout.directories)]
    held = [sum((candidate / folder).is_dir() for folder in layout.folders) for candidate in candidates]
    if max(held) == 0:
        looked_in = ", ".join(str(candidate) for candidate in candidates)
        return Problem(root, f"no {layout.name} dataset here; looked for {layout.train}/ in {looked_in}", missing=True)
    return candidates[held.index(max(held))]


JUNK = ("__macosx", "thumbs.db", "desktop.ini")


def is_junk(name: str) -> bool:
    """Whether a file or directory of this name is hidden, or left by a desktop or an archiver."""
    return name.startswith(".") or name.lower() in JUNK


def image_names(folder: Path) -> set[str]:
    """Names of the image files directly in a directory; hidden files are left out."""
    with os.scandir(folder) as entries:
        return {
            entry.name
            for entry in entries
            if not is_junk(entry.name) and entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file()
        }


def images_by_stem(folder: Path) -> dict[str, list[str]]:
    """`image_names`, sorted, by what is before the suffix in lower case: more than one are the same image twice."""
    found: dict[str, list[str]] = {}
    for name in sorted(image_names(folder)):
        found.setdefault(os.path.splitext(name)[0].lower(), []).append(name)
    return found


def paired_samples(
    folders: Sequence[Path],
    parse: Callable[[str], Labels | None],
    expected: str,
    prefix: str = "",
    needed: Sequence[bool] | None = None,
) -> Iterator[Sample | Problem]:
    """Samples of which each modality has its own directory, paired by file name whatever its suffix and its case.

    Args:
        folders: one directory per modality.
        parse: what a file name says, or None when it does not parse.
        expected: the file names that parse, in words.
        prefix: what stands before the file name in the sample's name.
        needed: whether a sample has to have a file in each directory; none: in all. Where it lacks one in another, its
            source is where that file would be.
    """
    needed = needed or [True] * len(folders)
    absent_folders = [folder for folder, need in zip(folders, needed, strict=True) if need and not folder.is_dir()]
    if absent_folders:
        yield from (Problem(folder, "missing directory of a modality", missing=True) for folder in absent_folders)
        return
    listed = [images_by_stem(folder) if folder.is_dir() else {} for folder in folders]
    stems = set().union(*(by_stem for by_stem, need in zip(listed, needed, strict=True) if need))
    first = {stem: min(names for by_stem in listed for names in by_stem.get(stem, ())) for stem in stems}
    for stem in sorted(first, key=lambda stem: first[stem]):
        paths = [
            [folder / name for name in by_stem.get(stem, ())] for folder, by_stem in zip(folders, listed, strict=True)
        ]
        holding = tuple(path for files in paths for path in files)
        problems = list(_unpaired(folders, paths, first[stem], needed))
        labels = parse(holding[0].name)
        if problems:
            yield from problems
        elif labels is None:
            yield unparsable(holding[0], expected, holding)
        else:
            chosen = [files[0] if files else folder / first[stem] for folder, files in zip(folders, paths, strict=True)]
            yield Sample(*labels, sources=tuple(map(ImageSource, chosen)), name=prefix + holding[0].name)


def _unpaired(
    folders: Sequence[Path], paths: Sequence[Sequence[Path]], name: str, needed: Sequence[bool]
) -> Iterator[Problem]:
    """What keeps the files of one name from being a sample."""
    holding = tuple(path for files in paths for path in files)
    for folder, files, need in zip(folders, paths, needed, strict=True):
        if need and not files:
            message = f"missing modality; {_relative(holding[0])} has no counterpart"
            yield Problem(folder / name, message, kind=UNPAIRED, files=holding)
    yield from (twice(files, holding) for files, need in zip(paths, needed, strict=True) if need and len(files) > 1)


def twice(paths: Sequence[Path], files: tuple[Path, ...]) -> Problem:
    """The problem of one image that is there as two files."""
    others = ", ".join(path.name for path in paths[1:])
    return Problem(paths[0], f"beside {others}: which of them is meant?", kind=UNPAIRED, files=files)


def unparsable(path: Path, expected: str, files: tuple[Path, ...] = ()) -> Problem:
    """The problem of a file name that says nothing."""
    return Problem(path, f"name does not parse, expected {expected}", files=files)


def _relative(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"

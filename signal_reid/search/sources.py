"""One's own images as items: a directory, a list or a manifest, with the modalities that each of them has."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from signal_reid.config import Config
from signal_reid.data import DataError, Dataset, Sample
from signal_reid.data.configured import options_of
from signal_reid.data.layouts import IMAGE_SUFFIXES, ImageSource, find_layout
from signal_reid.data.layouts.options import Reading
from signal_reid.data.tables import PARQUET_SUFFIXES, TableError, read_table
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.files import is_file
from signal_reid.runtime.text import shown
from signal_reid.search.segments import UNKNOWN, Entry

LIST_SUFFIXES, MANIFEST_SUFFIXES = (".txt", ".lst"), (".csv", *PARQUET_SUFFIXES)
MOST_ITEMS = 2**19
"""Lines of a list whatever their length; a list of longer lines may have more."""
_SHORTEST_LINE = 20
_PART = re.compile(r"(.+)#xywh=(\d{1,6}),(\d{1,6}),(\d{1,6}),(\d{1,6})")
_WHOLE, _NUMBER = re.compile(r"\d{1,18}", re.ASCII), re.compile(r"-?\d+", re.ASCII)
_TEXTS_FROM = 2**52
"""Numbers that stand for texts are larger, so that they are none that a file says, and JSON holds them."""


def modality_names(config: Config) -> tuple[str, ...]:
    """The names of the model's modalities, in the order of its images."""
    names = getattr(config.data, "modalities", None) or find_layout(config.data.dataset).modalities
    return names if len(names) == config.model.modalities else tuple(map(str, range(config.model.modalities)))


def find_entries(
    source: str | Path, modalities: Sequence[str], patterns: Mapping[str, str] | None = None
) -> list[Entry]:
    """The items of a directory, sorted by name, or of a list or a manifest, in their order.

    A directory has a directory for each modality, named after it in any case, and images of one item have one name
    below these, whatever their suffix; a model of one modality may do without. Or `patterns` say where the images
    are: `{"RGB": "*_rgb.png", "TI": "thermal/*.tif"}`, where `*` stands for the name of the item.

    A list (.txt) has a line for each item: its paths, by modality, with tabs between, an empty one for an absent
    image. Paths are told from the list's directory. Its items are named by their first path, as a manifest's are.

    A manifest (.csv, .parquet) has a column of paths for each modality that there is, told from its directory, an empty
    cell for an absent image, and may have the columns `identity` and `camera`; other columns are left alone. Texts that
    are no whole numbers become numbers from 2^52 on, a text the same in every file; all texts are kept as names.
    `PATH#xywh=LEFT,UPPER,WIDTH,HEIGHT` is a part of a composite, which the parts that an item names must cover.

    Args:
        source: what to look through.
        modalities: of the model.
        patterns: by modality; a modality without one is absent.

    Returns:
        At least one item, each with an image of at least one modality.

    Raises:
        FileNotFoundError: there is no such directory or list.
        InputError: it does not say which image is of which modality, or holds none; Parquet without pyarrow.
        DataError: two images are of one item and modality, or a list names no file.
    """
    source = Path(source).expanduser().absolute()
    if source.is_dir():
        entries = _in_directory(source, modalities, patterns or _own_patterns(source, modalities))
    elif not source.exists():
        raise FileNotFoundError(f"{source}: no such file or directory")
    elif source.suffix.lower() in LIST_SUFFIXES:
        entries = list(_in_list(source, modalities))
    elif source.suffix.lower() in MANIFEST_SUFFIXES:
        entries = list(_in_manifest(source, modalities))
    else:
        told = f"a directory, a list ({', '.join(LIST_SUFFIXES)}) or a manifest ({', '.join(MANIFEST_SUFFIXES)})"
        raise InputError(f"{source}: images are told by {told}")
    if not entries:
        raise InputError(f"{source}: no images ({', '.join(IMAGE_SUFFIXES)})")
    return entries


def entries_of(samples: Sequence[Sample], dataset: Dataset | None = None) -> list[Entry]:
    """The samples of a data set as items, with their labels.

    An identity that its files call by a text has the number of that text, as in a list of images (`find_entries`).

    Args:
        samples: of a split.
        dataset: that they are of, which knows what the files call cameras and identities; none: numbers alone.
    """
    identities = {} if dataset is None else dataset.identity_names
    cameras = {} if dataset is None else dataset.camera_names
    numbers = {identity: number for identity, name in identities.items() if (number := _number_of(name)) is not None}
    return [
        Entry(
            s.name,
            s.sources,
            numbers.get(s.identity, s.identity),
            s.camera,
            identities.get(s.identity, ""),
            cameras.get(s.camera, ""),
        )
        for s in samples
    ]


def readings(config: Config, modalities: Sequence[str]) -> list[Reading]:
    """How the images of each modality are read, as the training of the weights read them."""
    options = options_of(config)
    return [options.reading(name) for name in modalities]


def read_as(entry: Entry, readings: Sequence[Reading]) -> Entry:
    """An item whose images are read as stated, by modality."""
    pairs = zip(entry.sources, readings, strict=True)
    sources = tuple(source and replace(source, reading=reading) for source, reading in pairs)
    return replace(entry, sources=sources)


def query_entry(images: Mapping[str, str | Path], modalities: Sequence[str]) -> Entry:
    """An item from a file for each of some modalities.

    Raises:
        InputError: a modality that the model does not have, or none.
        FileNotFoundError: a file is missing.
    """
    check_modalities(images, modalities)
    for path in images.values():
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such image")
    sources = tuple(ImageSource(Path(images[name]).absolute()) if name in images else None for name in modalities)
    return Entry(", ".join(source.path.name for source in sources if source is not None), sources)


def check_modalities(given: Mapping[str, object], modalities: Sequence[str]) -> None:
    """Refuse what are not modalities of the model.

    Raises:
        InputError: naming them.
    """
    unknown = [name for name in given if name not in modalities]
    if unknown or not given:
        what = f"got {shown(unknown[0])}" if unknown else "got none"
        raise InputError(f"images must be of the modalities {', '.join(modalities)}, {what}")


def _own_patterns(directory: Path, modalities: Sequence[str]) -> dict[str, str]:
    """The directories of a directory that are named after modalities, as patterns."""
    below = {entry.name for entry in os.scandir(directory) if entry.is_dir()}
    found = {
        modality: f"{name}/*" for modality in modalities for name in sorted(below) if name.lower() == modality.lower()
    }
    if not found and len(modalities) == 1:
        return {modalities[0]: "*"}
    if not found:
        raise InputError(
            f"{directory}: which image is of which modality? It has no directory {', '.join(modalities)}; "
            f"give patterns, such as {modalities[0]}='*.jpg' where all are {modalities[0]}"
        )
    return found


def _in_directory(root: Path, modalities: Sequence[str], patterns: Mapping[str, str]) -> list[Entry]:
    check_modalities(patterns, modalities)
    for modality, pattern in patterns.items():
        if pattern.count("*") != 1:
            raise InputError(f"the pattern of {modality} must have one *, got {shown(pattern)}")
    found: dict[str, list[ImageSource | None]] = {}
    for path in _images_below(root):
        relative = path.relative_to(root).as_posix()
        for modality, pattern in patterns.items():
            name = _matched(relative, pattern)
            if name is None:
                continue
            sources = found.setdefault(name, [None] * len(modalities))
            place = modalities.index(modality)
            taken = sources[place]
            if taken is not None:
                raise DataError(f"{taken.path} and {path} are both {modality} of {shown(name)}; remove one")
            sources[place] = ImageSource(path)
    return [Entry(name, tuple(sources)) for name, sources in sorted(found.items())]


def _matched(path: str, pattern: str) -> str | None:
    """What `*` stands for, without the suffix of an image; none where the path does not match."""
    before, after = pattern.split("*")
    if not (path.startswith(before) and path.endswith(after) and len(path) > len(before) + len(after)):
        return None
    name = path[len(before) : len(path) - len(after)]
    return name if after else os.path.splitext(name)[0]


def _images_below(root: Path) -> Iterator[Path]:
    """The images of a directory and those below it, in an order that no disk decides; hidden files are left out."""
    for directory, below, files in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith((".", "__MACOSX")))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES):
                yield Path(directory, name)


def _in_list(path: Path, modalities: Sequence[str]) -> Iterator[Entry]:
    most = MOST_ITEMS + path.stat().st_size // _SHORTEST_LINE
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="surrogateescape").split("\n"), start=1):
        if number > most:
            raise DataError(f"{path}: more than {most} lines, of fewer than {_SHORTEST_LINE} characters each")
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) > len(modalities):
            given = f"{len(cells)} paths, more than the modalities {', '.join(modalities)}"
            raise DataError(f"{path}: line {number}: {given}")
        if any(cells):
            cells += [""] * (len(modalities) - len(cells))
            yield _entry(path, number, cells)


def _in_manifest(path: Path, modalities: Sequence[str]) -> Iterator[Entry]:
    try:
        table = read_table(path)
    except TableError as error:
        raise DataError(f"{path}: {error}") from None
    if not set(modalities) & set(table.columns):
        given = shown(list(table.columns))
        raise DataError(f"{path}: line 1: no column is one of {', '.join(modalities)}, got {given}")
    for line, what in table.problems:
        raise DataError(f"{path}: line {line}: {what}")
    for line, cells in table.rows:
        identity, camera = (_label(path, line, cells, name) for name in ("identity", "camera"))
        entry = _entry(path, line, [cells.get(name, "") for name in modalities])
        called, place = cells.get("identity", ""), cells.get("camera", "")
        yield replace(entry, identity=identity, camera=camera, identity_name=called, camera_name=place)


def _label(path: Path, number: int, row: Mapping[str, str], name: str) -> int:
    text = row.get(name, "")
    label = _number_of(text)
    if label is None:
        raise DataError(f"{path}: line {number}: {name} must not be negative or beyond 18 digits, got {shown(text)}")
    return label


def _number_of(text: str) -> int | None:
    """The number of an identity or camera: what the text says, or one made of it, the same whatever the file.

    None where it says a number that is none of an identity.
    """
    if _WHOLE.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        return None
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).digest()
    return _TEXTS_FROM + int.from_bytes(digest[:6], "big") if text else UNKNOWN


def _entry(path: Path, number: int, cells: Sequence[str]) -> Entry:
    """The item of a line that has a path, or nothing, for each modality."""
    sources = tuple(_source(path.parent, cell) if cell else None for cell in cells)
    if not any(cells):
        raise DataError(f"{path}: line {number}: there is no image")
    for cell, source in zip(cells, sources, strict=True):
        if source is not None and not is_file(source.path):
            raise DataError(f"{path}: line {number}: no file {shown(cell)}")
    return Entry(next(cell for cell in cells if cell), sources)


def _source(directory: Path, text: str) -> ImageSource:
    part = _PART.fullmatch(text)
    if part is None:
        return ImageSource(directory / text)
    left, upper, width, height = map(int, part.groups()[1:])
    return ImageSource(directory / part[1], (left, upper, left + width, upper + height))

"""Any images: a CSV or Parquet file with a line per sample, its paths by modality and what is known of it.

The columns `split` (`train`, `query`, `gallery`, or `test` for query and gallery at once) and `identity` are needed;
`camera`, `scene` and `view` may be there. Any other column is a modality and holds paths, told from the file's
directory; `PATH#xywh=LEFT,UPPER,WIDTH,HEIGHT` is a part of an image. `data.modalities` says which columns are used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL.Image import Image

from signal_reid.data.errors import Problem, ProblemList
from signal_reid.data.layouts.base import (
    NO_CAMERA,
    NO_SCENE,
    SPLITS,
    UNPAIRED,
    FileContents,
    ImageSource,
    Layout,
    Sample,
    Shot,
    SyntheticTwin,
)
from signal_reid.data.layouts.options import Options
from signal_reid.data.tables import Row, Table, TableError, read_table
from signal_reid.runtime.files import is_file
from signal_reid.runtime.text import shown

SPLITS_OF = {"train": ("train",), "query": ("query",), "gallery": ("gallery",), "test": ("query", "gallery")}
"""What the column `split` may say, and the splits that it stands for."""
KNOWN = ("split", "identity", "camera", "scene", "view")
"""The columns that are no modality."""
NEEDED = ("split", "identity")
LARGEST_KEPT = 999
"""Cameras, scenes and views of numbers up to this keep them; others are numbered in their order."""

_WHOLE = re.compile(r"-?[0-9]{1,18}")
_PART = re.compile(r"(.+)#xywh=(\d{1,6}),(\d{1,6}),(\d{1,6}),(\d{1,6})")


def scan_file(path: Path, options: Options) -> FileContents:
    """The samples of a manifest, and everything that is wrong with it, each with its line."""
    empty: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    try:
        table = read_table(path)
    except TableError as error:
        return FileContents(empty, (), [Problem(path, str(error))])
    modalities = tuple(column for column in table.columns if column not in KNOWN)
    missing = [f"there is no column {name!r}" for name in NEEDED if name not in table.columns]
    if not modalities:
        missing.append("there is no column of paths, which every column but those is")
    if missing:
        what = f"{'; '.join(missing)} (columns: {', '.join(map(shown, table.columns))})"
        return FileContents(empty, modalities, [Problem(path, f"line 1: {what}")])
    return _Reader(path, table, modalities, options.modalities).contents()


class _Labels(NamedTuple):
    """The numbers that a column's texts stand for."""

    numbers: Mapping[str, int]

    @staticmethod
    def of(texts: set[str], largest: int) -> _Labels:
        """Whole numbers up to a largest are kept; other texts are numbered from 0 in their order."""
        if all(_WHOLE.fullmatch(text) for text in texts):
            if all(0 <= int(text) <= largest for text in texts):
                return _Labels({text: int(text) for text in texts})
            place = {number: index for index, number in enumerate(sorted({int(text) for text in texts}))}
            return _Labels({text: place[int(text)] for text in texts})
        return _Labels({text: index for index, text in enumerate(sorted(texts))})


def _names(numbers: Mapping[str, int]) -> dict[int, str]:
    """The text that stands for each number: of several, such as 1 and 01, the shortest."""
    texts = sorted(numbers, key=lambda text: (len(text), text), reverse=True)
    return {numbers[text]: text for text in texts}


class _Reader:
    """Turns a table into samples and problems.

    Args:
        path: of the manifest.
        table: what it holds.
        modalities: its columns of paths.
        asked: those that will be used, whose files alone have to be there; none: all.
    """

    def __init__(self, path: Path, table: Table, modalities: tuple[str, ...], asked: Sequence[str] | None) -> None:
        self.path, self.table, self.modalities = path, table, modalities
        self.asked = [name for name in modalities if asked is None or name in asked]
        self.camera = next((name for name in ("camera", "view") if name in table.columns), None)
        self.problems = ProblemList(path)
        self.seen: dict[tuple[str, str], int] = {}

    def contents(self) -> FileContents:
        rows = [row for row in self.table.rows if self._is_sound(row)]
        identities = self._labels("identity", rows, largest=2**62)
        cameras = self._labels(self.camera, rows) if self.camera else None
        scenes = self._labels("scene", rows) if "scene" in self.table.columns else None
        splits: dict[str, list[Sample]] = {split: [] for split in SPLITS}
        for row in rows:
            sample = Sample(
                identity=identities[row.cells["identity"]],
                camera=NO_CAMERA if cameras is None or self.camera is None else cameras[row.cells[self.camera]],
                scene=NO_SCENE if scenes is None else scenes[row.cells["scene"]],
                sources=tuple(self._source(row.cells[name]) for name in self.modalities),
                name=row.cells[self.asked[0]] if self.asked else str(row.line),
            )
            for split in SPLITS_OF[row.cells["split"]]:
                splits[split].append(sample)
        for samples in splits.values():
            samples.sort(key=lambda sample: sample.name)
        for line, what in self.table.problems:
            self.problems.add(f"line {line}: {what}")
        self.problems.add_unlisted(self.table.unlisted)
        problems = sorted(self.problems.listed(), key=_line)
        called = {number: name for number, name in _names(identities).items() if name != str(number)}
        return FileContents(splits, self.modalities, problems, None if cameras is None else _names(cameras), called)

    def _labels(self, column: str, rows: Sequence[Row], largest: int = LARGEST_KEPT) -> Mapping[str, int]:
        return _Labels.of({row.cells[column] for row in rows}, largest).numbers

    def _is_sound(self, row: Row) -> bool:
        """Whether a line is a sample; what is wrong with it becomes problems."""
        unsound = [(what, "") for what in self._mistakes(row)]
        files = list(self._missing_files(row))
        kind = UNPAIRED if 0 < len(files) < len(self.asked) else ""
        unsound += [(what, kind) for what in files]
        if not unsound:
            unsound += [(what, "") for what in self._repetitions(row)]
        for what, kind in unsound:
            self.problems.add(f"line {row.line}: {what}", kind)
        return not unsound

    def _mistakes(self, row: Row) -> Iterator[str]:
        split = row.cells["split"]
        if split not in SPLITS_OF:
            yield f"split must be one of {', '.join(SPLITS_OF)}, got {shown(split)}"
        for column in KNOWN[1:]:
            text = row.cells.get(column)
            if text == "":
                remedy = "" if column == "identity" else "; fill it in every line or leave the column out"
                yield f"{column} is empty{remedy}"
            elif text is not None and _WHOLE.fullmatch(text) and int(text) < 0:
                yield f"{column} must not be negative, got {text}; leave the line out where it is unknown"

    def _missing_files(self, row: Row) -> Iterator[str]:
        for name in self.asked:
            text = row.cells[name]
            if not text:
                yield f"{name} is empty"
            elif not is_file(self._source(text).path):
                yield f"{name} names no file: {shown(text)}"

    def _repetitions(self, row: Row) -> Iterator[str]:
        for split in SPLITS_OF[row.cells["split"]]:
            first = self.seen.setdefault((split, row.cells[self.asked[0]]), row.line) if self.asked else row.line
            if first != row.line:
                yield f"{self.asked[0]} {shown(row.cells[self.asked[0]])} stands in line {first} of {split} already"

    def _source(self, text: str) -> ImageSource:
        part = _PART.fullmatch(text)
        if part is None:
            return ImageSource(self.path.parent / text)
        left, upper, width, height = (int(number) for number in part.groups()[1:])
        return ImageSource(self.path.parent / part[1], (left, upper, left + width, upper + height))


def _line(problem: Problem) -> float:
    """The line that a problem names; what is said of all lines comes last."""
    named = re.match(r"line (\d+): ", problem.message)
    return int(named[1]) if named else math.inf


def synthetic_files(shot: Shot, pictures: Sequence[Image]) -> dict[str, Image]:
    """A picture for each modality, beside the manifest."""
    return {f"images/{_stem(shot)}_{name}.jpg": p for name, p in zip(MODALITIES, pictures, strict=True)}


def synthetic_texts(shots: Sequence[Shot]) -> dict[str, str]:
    """The manifest itself; queries stay in the gallery."""
    lines = [",".join(("split", "identity", "camera", *MODALITIES))]
    for shot in shots:
        split = "train" if shot.split == "train" else "test" if shot.is_query else "gallery"
        paths = (f"images/{_stem(shot)}_{name}.jpg" for name in MODALITIES)
        lines.append(",".join((split, f"{shot.identity:06d}", f"cam{shot.camera}", *paths)))
    return {"manifest.csv": "\n".join(lines) + "\n"}


def _stem(shot: Shot) -> str:
    return f"{shot.identity:06d}_cam{shot.camera}_{shot.number:04d}"


MODALITIES = ("RGB", "NI", "TI")
"""Modalities of the synthetic twin."""

LAYOUT = Layout(
    name="manifest",
    modalities=(),
    directories=(),
    train="",
    query="",
    gallery="",
    protocol="camera",
    scan_split=lambda directory: iter(()),
    twin=SyntheticTwin(
        subject="person",
        most_identities=999_999,
        most_cameras=999,
        image_size=(256, 128),
        files=synthetic_files,
        texts=synthetic_texts,
    ),
    scan_file=scan_file,
)

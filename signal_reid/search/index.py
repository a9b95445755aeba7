"""An index of features on disk: built, extended and searched, tied to the weights that made its features."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from signal_reid.runtime.distributed import ALONE, Processes
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.files import write_atomically
from signal_reid.runtime.ownership import owned
from signal_reid.runtime.text import is_number, is_whole, read_json, shortened
from signal_reid.search.calibration import Threshold
from signal_reid.search.exact import Codes, Nearest, merge, search_block, search_few
from signal_reid.search.neighbours import KINDS, Kind, Neighbours, write_neighbours
from signal_reid.search.segments import STORAGE, Entry, Segment, Storage, damaged, write_segment

FILE = "index.json"
_VERSION = 1
_PAIRS_AT_ONCE = 2**24  # of queries and items
_SPARE = 16  # items that FAISS is asked for beyond the wanted, and as many again


@dataclass(frozen=True)
class Part:
    """A segment of an index, as its description names it."""

    file: str
    rows: int
    summary: int
    """`Segment.summary` of the file."""
    process: int = 0
    """Which of the processes that built the index has the file."""
    neighbours: str | None = None
    """FAISS's index of it."""
    neighbours_crc: int = 0


@dataclass(frozen=True)
class Description:
    """What an index is, beside its segments."""

    fingerprint: str
    """Fingerprint of the weights that made its features."""
    modalities: tuple[str, ...]
    dimension: int
    storage: Storage = "fp16"
    kind: Kind = "exact"
    threshold: Threshold | None = None
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        for name, value, allowed in (("storage", self.storage, tuple(STORAGE)), ("kind", self.kind, KINDS)):
            if value not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

    def __len__(self) -> int:
        return sum(part.rows for part in self.parts)


@dataclass(frozen=True)
class Hit:
    """An item that a search found."""

    rank: int
    """From 1."""
    score: float
    """Cosine similarity to the query, in [-1, 1] up to rounding."""
    row: int
    """Place in the index, from 0, in the order in which items were added."""
    entry: Entry
    accepted: bool | None = None
    """Whether the score reaches the index's threshold; none where the index has none."""

    @property
    def name(self) -> str:
        return self.entry.name


class Index:
    """Features in a directory: `index.json`, which names the segments, and a file for each of these.

    What is added becomes a segment of its own; then `index.json` is replaced. So an end in the middle leaves the index
    as it was, and a file that nothing names, which the next addition replaces.

    Args:
        path: the directory.

    Raises:
        FileNotFoundError: there is no index.
        InputError: it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.description = _read(self.path / FILE)
        self._segments: dict[str, Segment] = {}
        self._loaded: dict[str, Codes | Neighbours] = {}

    @staticmethod
    def create(path: str | Path, description: Description) -> Index:
        """Begin an index without items, in the place of one that has none either, as a process that was killed leaves.

        Raises:
            InputError: there is an index with items already.
            OSError: the directory cannot be made or written to.
        """
        path = Path(path)
        with _owned(path):
            check_free(path)
            _write(path / FILE, replace(description, parts=()))
        return Index(path)

    def __len__(self) -> int:
        return len(self.description)

    def discard_if_empty(self) -> None:
        """Remove an index that has no items, and its directory where nothing else is in it."""
        with _owned(self.path):
            if not _read(self.path / FILE).parts:
                (self.path / FILE).unlink()
        with suppress(OSError):
            self.path.rmdir()

    def add(self, entries: Sequence[Entry], features: Iterable[Tensor], processes: Processes = ALONE) -> None:
        """Append items; of several processes each writes a segment of its share where it works.

        Args:
            entries: of this process, in the order of ranks.
            features: (n, d) in parts, of any length but zero; a part at a time is in memory.
            processes: that share the work.

        Raises:
            InputError: features of another size, number or that are not finite.
            InUseError: another process adds to the index.
            OSError: the disk is full or refuses.
        """
        with _owned(self.path) if processes.local_rank == 0 else nullcontext():
            processes.wait()
            before = _read(self.path / FILE)  # others may have added since it was opened
            number = len(before.parts) + processes.rank
            part = self._write_part(number, entries, features, before, processes.rank) if entries else None
            parts = [Part(**part) for part in processes.exchange(part and asdict(part)) if part is not None]
            after = replace(before, parts=(*before.parts, *parts))
            if processes.local_rank == 0:  # a machine that has its own disk has its own description
                _write(self.path / FILE, after)
            processes.wait()
        self.description = after

    def search(self, queries: Tensor, top: int = 10, processes: Processes = ALONE) -> list[list[Hit]]:
        """The nearest items of each query, the best first, equal scores in the order of the items.

        An exact index gives what the fp64 products of every pair would, each rounded to fp32. Of several processes
        each searches the segments that it wrote, and all get what one process would.

        Args:
            queries: (m, d) floating point, finite, of any length but zero.
            top: items per query; a smaller index cuts it.
            processes: that share the work; each gives the same queries.

        Raises:
            InputError: queries of another size or that are not finite, or a damaged file.
            FileNotFoundError: a segment is missing.
        """
        if top < 1:
            raise InputError(f"top must be at least 1, got {top}")
        queries = _unit(queries, self.description.dimension, "queries")
        top = min(top, len(self))
        hits: list[list[Hit]] = []
        at_once = max(1, _PAIRS_AT_ONCE // max(1, len(self)))
        for some in queries.split(at_once):
            scores, rows = self._search(some, top, processes)
            hits += self._hits(scores, rows, processes)
        return hits

    def load(self, processes: Processes = ALONE) -> None:
        """Read and check everything once, so that each search afterwards takes a fraction of it.

        An exact index keeps a byte for each number in memory; what FAISS maps into memory is read as it is needed.

        Raises:
            InputError: a damaged file.
            FileNotFoundError: a segment is missing.
        """
        for _, part in self._own(processes):
            if part.file in self._loaded:
                continue
            segment = self._segment(part)
            if part.neighbours is not None:
                segment.check()
                self._loaded[part.file] = Neighbours(self.path / part.neighbours, part.neighbours_crc)
                continue
            codes = Codes(len(segment), segment.dimension)
            for first, features in segment.blocks():
                codes.fill(first, features)
            self._loaded[part.file] = codes

    def check(self) -> None:
        """Hold every file against its checksums.

        Raises:
            InputError: a damaged file, which it names.
            FileNotFoundError: a missing one.
        """
        for part in self.description.parts:
            self._segment(part).check()
            if part.neighbours is not None:
                Neighbours(self.path / part.neighbours, part.neighbours_crc)

    def set_threshold(self, threshold: Threshold | None) -> None:
        """Keep the score from which on a search accepts an item."""
        with _owned(self.path):
            self.description = replace(_read(self.path / FILE), threshold=threshold)
            _write(self.path / FILE, self.description)

    def labelled(self) -> tuple[Tensor, Tensor]:
        """Features (n, d) and identities (n,) of the items whose identity is known."""
        features, identities = [], []
        for part in self.description.parts:
            segment = self._segment(part)
            known = torch.from_numpy(segment.identities.copy())
            for first, block in segment.blocks():
                chosen = known[first : first + len(block)] >= 0
                features.append(block[chosen])
                identities.append(known[first : first + len(block)][chosen])
        if not features:
            return torch.empty(0, self.description.dimension), torch.empty(0, dtype=torch.int64)
        return torch.cat(features), torch.cat(identities)

    def entries(self) -> Iterator[Entry]:
        """What is known of each item, in order."""
        for part in self.description.parts:
            segment = self._segment(part)
            yield from (segment.entry(row) for row in range(len(segment)))

    def rows(self) -> Iterator[tuple[int, Entry, Tensor]]:
        """Number, item and feature (d,) of each in order, a block at a time in memory: to load them elsewhere."""
        start = 0
        for part in self.description.parts:
            segment = self._segment(part)
            for first, block in segment.blocks():
                for row, feature in enumerate(block, start=first):
                    yield start + row, segment.entry(row), feature
            start += part.rows

    def _write_part(
        self, number: int, entries: Sequence[Entry], features: Iterable[Tensor], description: Description, process: int
    ) -> Part:
        name = f"segment-{number:05d}"
        file, d = f"{name}.safetensors", description.dimension
        unit = (_unit(part, d, "features") for part in features)
        summary = write_segment(self.path / file, entries, d, description.storage, unit)
        part = Part(file, len(entries), summary, process)
        if description.kind == "exact":
            return part
        beside = f"{name}.faiss"
        crc = write_neighbours(self.path / beside, Segment(self.path / file), description.kind)
        return replace(part, neighbours=beside, neighbours_crc=crc)

    def _own(self, processes: Processes) -> Iterator[tuple[int, Part]]:
        """The segments that this process searches, each with the row of its first item."""
        first = 0
        for part in self.description.parts:
            if part.process % processes.size == processes.rank:
                yield first, part
            first += part.rows

    def _segment(self, part: Part) -> Segment:
        if part.file not in self._segments:
            segment = Segment(self.path / part.file)
            if (len(segment), segment.summary, segment.dimension) != (
                part.rows,
                part.summary,
                self.description.dimension,
            ):
                raise damaged(segment.path, f"it is not the file that {FILE} names")
            self._segments[part.file] = segment
        return self._segments[part.file]

    def _search(self, queries: Tensor, top: int, processes: Processes) -> tuple[Tensor, Tensor]:
        """Scores and rows (m, top) of the best items of all processes."""
        nearest = Nearest(queries, top)
        for first, part in self._own(processes):
            self._search_part(nearest, first, part)
        if processes.size == 1:
            return nearest.scores, nearest.rows
        scores, rows = (processes.gather(found[None], "cpu") for found in (nearest.scores, nearest.rows))
        assert scores is not None
        assert rows is not None
        return merge(queries, top, zip(scores, rows, strict=True))

    def _search_part(self, nearest: Nearest, first: int, part: Part) -> None:
        segment, loaded = self._segment(part), self._loaded.get(part.file)
        if loaded is None and part.neighbours is not None:
            loaded = Neighbours(self.path / part.neighbours, part.neighbours_crc)
        if isinstance(loaded, Codes):
            loaded.search(nearest, first, segment.mapped())
        elif isinstance(loaded, Neighbours):
            features = segment.mapped()
            top = nearest.rows.shape[1]
            for query, rows in enumerate(loaded.find(nearest.queries, 2 * top + _SPARE)):
                search_few(nearest, query, first, rows, torch.from_numpy(features[rows.numpy()]))
        else:
            for row, block in segment.blocks():
                search_block(nearest, first + row, block)

    def _hits(self, scores: Tensor, rows: Tensor, processes: Processes) -> list[list[Hit]]:
        known = self._known(rows, processes)
        threshold = self.description.threshold
        return [
            [
                Hit(rank, score, row, known[row], None if threshold is None else score >= threshold.score)
                for rank, (score, row) in enumerate(zip(*found, strict=True), start=1)
                if row in known
            ]
            for found in zip(scores.tolist(), rows.tolist(), strict=True)
        ]

    def _known(self, rows: Tensor, processes: Processes) -> dict[int, Entry]:
        """What is known of these rows, each told by the process that has it."""
        wanted = set(rows.flatten().tolist())
        own: dict[int, Entry] = {}
        for first, part in self._own(processes):
            here = [row for row in wanted if first <= row < first + part.rows]
            own.update({row: self._segment(part).entry(row - first) for row in here})
        return dict(chain.from_iterable(found.items() for found in processes.exchange(own)))


def check_free(path: Path) -> None:
    """Refuse a directory that holds an index with items, or one that cannot be read.

    Raises:
        InputError: it does.
    """
    try:
        held = (path / FILE).exists() and bool(_read(path / FILE).parts)
    except InputError:
        held = True
    if held:
        raise InputError(f"{path} holds an index already; add to it, or remove it first")


def _unit(features: Tensor, dimension: int, what: str) -> Tensor:
    """Features scaled to unit length in fp32, on the CPU."""
    if features.ndim != 2 or features.shape[1] != dimension or not features.is_floating_point():
        kind = f"{features.dtype} of shape {tuple(features.shape)}"
        raise InputError(f"{what} must be floating point of shape (n, {dimension}), got {kind}")
    features = F.normalize(features.detach().float().cpu(), dim=1)
    if not features.isfinite().all():
        raise InputError(f"{what} must be finite, got NaN or infinity")
    return features


@contextmanager
def _owned(path: Path) -> Iterator[None]:
    with owned(path, lambda _: None):
        yield


def _write(path: Path, description: Description) -> None:
    content = {"signal_reid_index": _VERSION, **asdict(description)}
    write_atomically(path, json.dumps({**content, "crc32": _crc(content)}, indent=2).encode() + b"\n")


def _read(path: Path) -> Description:
    if not path.is_file():
        raise FileNotFoundError(f"index: no index in {path.parent} (there is no {FILE})")
    try:
        content = read_json(path.read_bytes())
        crc = content.pop("crc32")
        if content["signal_reid_index"] != _VERSION:
            version = shortened(str(content["signal_reid_index"]))
            raise _VersionError(f"{path}: an index of version {version}, this program knows {_VERSION}")
        if crc != _crc(content):
            raise ValueError("it does not have its checksum")
        del content["signal_reid_index"]
        threshold = content.pop("threshold")
        parts = tuple(Part(**part) for part in content.pop("parts"))
        content["modalities"] = tuple(content["modalities"])
        description = Description(threshold=threshold and Threshold(**threshold), parts=parts, **content)
        _check(description)
        return description
    except _VersionError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, shortened(str(error))) from None


class _VersionError(InputError):
    pass


def _check(description: Description) -> None:
    """Refuse values that no index is written with, whose checksum may be right all the same."""
    texts = [description.fingerprint, *description.modalities]
    files: list[object] = [part.file for part in description.parts]
    files += [part.neighbours for part in description.parts if part.neighbours is not None]
    if not all(isinstance(text, str) for text in texts) or not all(map(_is_own_file, files)):
        raise ValueError("a name in it is none")
    counts = [description.dimension, *(part.rows for part in description.parts)]
    numbers = [number for part in description.parts for number in (part.summary, part.process, part.neighbours_crc)]
    if not all(is_whole(count, 1) for count in counts) or not all(map(is_whole, numbers)):
        raise ValueError("a number in it is none that an index has")
    if description.threshold is not None and not all(map(is_number, vars(description.threshold).values())):
        raise ValueError("its threshold is no numbers")


def _is_own_file(name: object) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"[\w-][\w.-]*", name, re.ASCII))


def _crc(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"

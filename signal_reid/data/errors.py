"""What can be wrong with a dataset: the error that is raised and the problem that is listed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from signal_reid.runtime.errors import InputError
from signal_reid.runtime.text import escaped


class DataError(InputError):
    """A dataset, an image or a packed file that cannot be used; the message is one line naming it."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a dataset on disk."""

    path: Path
    message: str
    severity: Literal["error", "warning"] = "error"
    missing: bool = False
    """A directory or dataset that is not there; raised as FileNotFoundError."""
    kind: str = ""
    """What problems have in common that a setting treats alike."""
    files: tuple[Path, ...] = ()
    """Paths that are left out for it, besides `path`."""
    count: int = 1
    """How many problems of this kind it stands for."""

    def __str__(self) -> str:
        return escaped(f"{self.path}: {self.message}")

    def error(self) -> DataError | FileNotFoundError:
        """The exception that says the same."""
        return FileNotFoundError(str(self)) if self.missing else DataError(str(self))


MOST_LISTED = 1000


class ProblemList:
    """The problems of one file: of each kind the first `MOST_LISTED`, and how many more there are.

    A file of 10 MB may hold millions of lines that are all wrong.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: list[Problem] = []
        self._counts: Counter[str] = Counter()

    def add(self, message: str, kind: str = "") -> None:
        """Note a problem."""
        self._counts[kind] += 1
        if self._counts[kind] <= MOST_LISTED:
            self._kept.append(Problem(self._path, message, kind=kind))

    def add_unlisted(self, count: int) -> None:
        """Count problems of no kind that are known by their number alone."""
        self._counts[""] += count

    def listed(self) -> list[Problem]:
        """The problems that are kept, as they were added, and a problem for the others of each kind."""
        listed = Counter(problem.kind for problem in self._kept)
        more = {kind: count - listed[kind] for kind, count in self._counts.items() if count > listed[kind]}
        rest = [
            Problem(self._path, f"{count} more lines are wrong", kind=kind, count=count) for kind, count in more.items()
        ]
        return [*self._kept, *rest]

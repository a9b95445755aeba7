"""What can be wrong with a dataset: the error that is raised and the problem that is listed."""

from __future__ import annotations

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

    def __str__(self) -> str:
        return escaped(f"{self.path}: {self.message}")

    def error(self) -> DataError | FileNotFoundError:
        """The exception that says the same."""
        return FileNotFoundError(str(self)) if self.missing else DataError(str(self))

"""Files that appear whole or not at all: written beside, flushed to disk, renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


class _FirstError:
    """Passes writes on and remembers the first failure, which torch.save hides behind an error of its own."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: OSError | None = None

    def write(self, content: bytes | memoryview) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._file.tell()


def write_file(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace a file by what `write` puts out; at every moment the path holds the old content or the new, whole.

    A process killed while writing leaves `NAME.PID.tmp` beside it, which the next call for that path removes.

    Args:
        path: the file; a link is followed.
        write: called with a binary file.

    Raises:
        FileNotFoundError: the directory does not exist.
        OSError: the disk is full or refuses; the old file is untouched and nothing is left beside it.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: no directory {target.parent}")
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a directory")
    _remove_leftovers(target)
    beside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        _write_and_flush(beside, write)
        os.replace(beside, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise OSError(error.errno, f"{reason} (what was there before is untouched)", str(path)) from None
        raise
    _flush_directory(target.parent)


def _write_and_flush(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with path.open("wb") as file:
        guarded = _FirstError(file)
        try:
            write(guarded)  # type: ignore[arg-type]  # all that the writers use of a file
            file.flush()
            os.fsync(file.fileno())
        except Exception as error:
            raise guarded.error or error from None


def _flush_directory(directory: Path) -> None:
    """Make the rename itself last; where directories cannot be flushed (Windows, some network disks) it is as is."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_leftovers(target: Path) -> None:
    for path in target.parent.iterdir():
        pid = path.name.removeprefix(f"{target.name}.").removesuffix(".tmp")
        if path.name == f"{target.name}.{pid}.tmp" and pid.isdecimal() and not _other_process(int(pid)):
            path.unlink(missing_ok=True)


def _other_process(pid: int) -> bool:
    """Whether another process of this number is alive and may be writing."""
    if pid == os.getpid() or os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def write_atomically(path: str | Path, content: bytes) -> None:
    """Replace a file by these bytes; see `write_file`."""
    write_file(path, lambda file: file.write(content))

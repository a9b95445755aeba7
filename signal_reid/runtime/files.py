"""Files that appear whole or not at all: written beside, flushed to disk, renamed."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_LONGEST_PREFIX = 150  # bytes of a file's name that its temporary name repeats; a name has 255
_DESCRIPTOR = re.compile(r"/(?:dev|proc/(?:thread-)?self)/fd/(\d+)", re.ASCII)
_MOST_LINKS = 40  # as Linux follows
_UNFINISHED = re.compile(r"\.(?P<machine>[0-9a-f]{12})-(?P<pid>\d+)-[0-9a-f]{8}\.tmp", re.ASCII)


class _Counted:
    """Passes writes on, counts their bytes, and remembers the first failure, which torch.save hides behind its own."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._written = 0
        self.error: OSError | None = None

    def write(self, content: bytes | memoryview) -> int:
        try:
            self._file.write(content)
        except OSError as error:
            self.error = self.error or error
            raise
        size = memoryview(content).nbytes
        self._written += size
        return size

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._written


def write_file(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace a file by what `write` puts out; at every moment the path holds the old content or the new, whole.

    The file keeps its mode. A device, a pipe or one of the process's own streams (`/dev/stdout`, or a link to it) is
    written to as it is. A process killed while writing leaves an unfinished file beside, `NAME.*.tmp`, which the next
    call for that path removes if it is of this machine and its process is gone.

    Args:
        path: the file; a link is followed.
        write: called with a binary file that can `write`, `flush` and `tell`.

    Raises:
        FileNotFoundError: the directory does not exist.
        OSError: the disk is full or refuses; the old file is untouched and nothing is left beside it. One of `write`
            about another file is left as it is.
    """
    if is_stream(path):
        _write_to_stream(path, write)
        return
    target = _target(path)
    _remove_leftovers(target)
    beside = _unfinished(target)
    try:
        _write_and_flush(beside, write, _mode(target))
        os.replace(beside, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError) and _is_about(error, beside):
            reason = error.strerror or str(error)
            raise OSError(error.errno, f"{reason} (what was there before is untouched)", str(path)) from None
        raise
    _flush_directory(target.parent)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Replace a file by these bytes; see `write_file`."""
    write_file(path, lambda file: file.write(content))


def is_file(path: Path) -> bool:
    """Whether there is a file of a name that a file gives, which may be far too long for a name."""
    try:
        return path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def check_writable(path: str | Path) -> None:
    """Find out before the work whether `write_file` could write there, by making an empty file beside it.

    Raises:
        FileNotFoundError: the directory does not exist.
        OSError: the place cannot be written to; the error names it.
    """
    if is_stream(path):
        if _descriptor(path) is None and not os.access(path, os.W_OK):
            raise PermissionError(f"cannot write {path}: permission denied")
        return
    beside = _unfinished(_target(path))
    try:
        beside.open("xb").close()
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def is_stream(path: str | Path) -> bool:
    """Whether it is nothing that another file may take the place of: a device, a pipe, a stream of the process."""
    try:
        kind = os.stat(path).st_mode
    except OSError:
        return False
    if stat.S_ISDIR(kind):
        return False
    # /dev/stdout leads to a regular file where the shell sent the output to one.
    return not stat.S_ISREG(kind) or _descriptor(path) is not None or os.path.abspath(path).startswith("/proc/")


def is_standard_output(path: str | Path) -> bool:
    """Whether what is written there goes where `print` writes to, so that nothing else should."""
    return _descriptor(path) == 1


def temporary_name(name: str) -> str:
    """A name that no other process on any machine takes, from which `may_be_removed` tells whose it is."""
    kept = os.fsdecode(os.fsencode(name)[:_LONGEST_PREFIX])
    return f"{kept}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"


def may_be_removed(name: str, of: str) -> bool:
    """Whether this is a `temporary_name` of `of` whose process ran on this machine and is gone."""
    kept = os.fsdecode(os.fsencode(of)[:_LONGEST_PREFIX])
    match = _UNFINISHED.fullmatch(name[len(kept) :]) if name.startswith(kept) else None
    return match is not None and match["machine"] == _machine() and not _is_alive(int(match["pid"]))


def _target(path: str | Path) -> Path:
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: no directory {target.parent}")
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a directory")
    return target


def _unfinished(target: Path) -> Path:
    return target.with_name(temporary_name(target.name))


def _descriptor(path: str | Path) -> int | None:
    """The process's own stream that a path names, perhaps through links: 1 for /dev/stdout; none for other paths."""
    name = os.path.abspath(path)
    for _ in range(_MOST_LINKS):
        if found := _DESCRIPTOR.fullmatch(name):
            return int(found[1])
        try:
            name = os.path.abspath(os.path.join(os.path.dirname(name), os.readlink(name)))
        except OSError:
            break
    return None


def _write_to_stream(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    try:
        # Where the shell sent the output to a file, one that is opened anew has a place of its own in it, and what is
        # printed later would be written over this.
        number = _descriptor(path)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND) if number is None else os.dup(number)
        with open(descriptor, "wb") as file:
            _pass_on(file, write)
    except OSError as error:
        if not _is_about(error, path):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def _is_about(error: OSError, path: str | Path) -> bool:
    """Whether it is not about another file, which is read to know what to write."""
    return error.filename is None or str(error.filename) == str(path)


def _mode(target: Path) -> int | None:
    """The permissions of the file that is replaced; None where there is none, and a new one has the process's own."""
    try:
        return stat.S_IMODE(target.stat().st_mode)
    except OSError:
        return None


def _write_and_flush(path: Path, write: Callable[[BinaryIO], object], mode: int | None) -> None:
    with path.open("xb") as file:
        if mode is not None:
            with contextlib.suppress(OSError):  # some network disks have no modes
                path.chmod(mode)
        _pass_on(file, write)
        os.fsync(file.fileno())


def _pass_on(file: BinaryIO, write: Callable[[BinaryIO], object]) -> None:
    counted = _Counted(file)
    try:
        write(counted)  # type: ignore[arg-type]  # all that the writers use of a file
        file.flush()
    except Exception as error:
        raise counted.error or error from None


def _flush_directory(directory: Path) -> None:
    """Make the rename itself last; where directories cannot be flushed (Windows, some network disks) it is as is."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_leftovers(target: Path) -> None:
    with contextlib.suppress(OSError):  # what cannot be swept does not keep anything from being written
        for path in target.parent.iterdir():
            if may_be_removed(path.name, target.name):
                path.unlink(missing_ok=True)


@functools.cache
def _machine() -> str:
    """Twelve digits that processes share only where they see each other's numbers: one boot, one container.

    Host names and machine numbers are copied with the images that machines are made from; a boot's number is not. On a
    system that tells none, every process is a machine of its own and removes nothing.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        seen = boot + os.readlink("/proc/self/ns/pid")
    except OSError:
        seen = secrets.token_hex()
    return hashlib.sha256(seen.encode()).hexdigest()[:12]


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True

"""A directory that one process owns while it works in it, on this machine and on others that share the disk."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from signal_reid.runtime.errors import UserError

NAME = "run.lock"

_REFUSED = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)

_held: dict[tuple[int, str], tuple[int, int]] = {}
"""By process and directory: the thread that owns it and how often it entered; what was forked from it owns nothing."""


class InUseError(UserError, RuntimeError):
    """Another process works in a directory; the message says which."""


@contextmanager
def owned(directory: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Own a directory for a block; the process that has it may own it once more inside.

    The system frees it when the process ends, however that comes about. It is a record lock of `run.lock`: unlike
    those of `flock`, workers do not inherit it, and network disks pass it on to the other machines.

    A directory that is not there is made, and removed again where nothing else came to lie in it.

    Args:
        directory: the directory.
        say: told where the disk knows no locks.

    Raises:
        InUseError: another process, or another thread of this one, owns it.
        OSError: the directory or the lock file cannot be made.
    """
    key = (os.getpid(), os.path.realpath(directory))
    thread, entered = _held.get(key, (threading.get_ident(), 0))
    if thread != threading.get_ident():
        raise InUseError(f"{directory} is in use by another thread of this process; a run directory has one owner")
    with nullcontext() if entered else _lock_file(directory, say):
        _held[key] = (thread, entered + 1)
        try:
            yield
        finally:
            _held[key] = (thread, entered)
            if not entered:
                del _held[key]


@contextmanager
def _lock_file(directory: Path, say: Callable[[str], None]) -> Iterator[None]:
    made = _make(directory)
    try:
        with _open_and_lock(directory / NAME, directory, say) as file:
            _sign(file)
            try:
                yield
            finally:
                with suppress(OSError):
                    (directory / NAME).unlink()  # while it is locked: whoever opened it meanwhile sees that it is gone
    finally:
        with suppress(OSError):  # not empty, as after any run that began
            for path in made:
                path.rmdir()


def _make(directory: Path) -> list[Path]:
    """Make a directory and those above it; which of them were not there, from within outwards."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return missing


def _open_and_lock(path: Path, directory: Path, say: Callable[[str], None]) -> BinaryIO:
    # One descriptor, unbuffered: closing any other of the same file would free a record lock.
    while True:
        file = path.open("a+b", buffering=0)
        try:
            if not _lock(file, directory):
                say(f"{directory} is on a disk without locks: nothing keeps another training out of it")
                return file
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()  # its owner ended between the two lines, and took the file away


def _lock(file: BinaryIO, directory: Path) -> bool:
    """Whether the lock was taken; where there are none it was not."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _REFUSED:
            raise InUseError(f"{directory} is in use by {_owner(file)}; a run directory has one owner") from None
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def _sign(file: BinaryIO) -> None:
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode())


def _owner(file: BinaryIO) -> str:
    try:
        file.seek(0)
        signed = json.loads(file.read(4096))
        return f"process {int(signed['pid'])} on {signed['host']!s:.100} since {signed['since']!s:.40}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"

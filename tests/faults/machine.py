"""The program in forked processes, on machines that are worse than this one: namespaces, small disks, limits.

Everything is forked from one process that has imported the program and computed nothing, so that a run costs what the
program does and not what its imports do. That process has no threads, and none may begin before the fork.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from signal_reid.cli import main

ENDING = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 120
"""Seconds after which a process counts as hanging."""

_libc = ctypes.CDLL(None, use_errno=True)
NEW_MOUNTS, NEW_HOST_NAME, NEW_PROCESSES = 0x20000, 0x4000000, 0x20000000
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 32, 4096, 16384, 1 << 18


@dataclass(frozen=True)
class End:
    """How a process ended: its exit code, or minus the signal that killed it, and what it wrote to its errors."""

    code: int
    errors: str

    def __str__(self) -> str:
        return f"exit code {self.code}: {self.errors.strip()[-2000:]}"


@dataclass
class Running:
    """The program at work in a process of its own.

    Attributes:
        pid: of the process.
        errors: the file of what it says.
        started: when, on the monotonic clock.
        alive: a pipe whose other end it holds with all that it started, to wait for them as well; none: it is closed.
    """

    pid: int
    errors: Path
    started: float
    alive: int | None = None

    def wait(self) -> End:
        """How it ends; one that does not within `PATIENCE` is killed, and says so."""
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._wait_for_others()
                return End(os.waitstatus_to_exitcode(status), self.errors.read_text(errors="replace"))
            if time.monotonic() - self.started > PATIENCE:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return End(999, "it hangs\n" + self.errors.read_text(errors="replace"))
            time.sleep(0.002)

    def _wait_for_others(self) -> None:
        """A process that dies with its parent dies a moment later."""
        if self.alive is not None:
            os.read(self.alive, 1)
            os.close(self.alive)
            self.alive = None

    def is_running(self) -> bool:
        """Whether it has not ended yet; its end stays to be waited for."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def tell(self, number: int) -> None:
        """Send a signal, which may come too late."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def children(self) -> list[int]:
        """The processes that it has started."""
        with suppress(OSError):
            listed = [path.read_text().split() for path in Path(f"/proc/{self.pid}/task").glob("*/children")]
            return [int(pid) for pids in listed for pid in pids]
        return []


def start(arguments: list[str], directory: Path, errors: Path, prepare: Callable[[], None] | None = None) -> Running:
    """Start the program in a directory; `prepare` is called first in its process."""

    def run() -> int:
        os.chdir(directory)
        sys.argv = ["signal-reid", *arguments]
        torch.set_num_threads(1)
        if prepare is not None:
            prepare()
        main()
        return 0

    started = time.monotonic()
    return Running(fork(run, errors), errors, started)


def fork(run: Callable[[], int], errors: Path) -> int:
    """The process that calls a function and ends with what it returns, as an interpreter ends; signals end it too."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    code = 1
    try:
        for number in ENDING:  # before the program cares for them, they end it
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor, stream in ((null, 0), (null, 1), (file, 2)):
            os.dup2(descriptor, stream)
        os.close(file)
        os.close(null)
        try:
            code = run()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _checked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def enter(namespaces: int) -> None:
    """Leave the namespaces of this process for new ones; mounts made from then on are seen by its children alone.

    Raises:
        OSError: it is not permitted.
    """
    _checked(_libc.unshare(namespaces))
    if namespaces & NEW_MOUNTS:
        _checked(_libc.mount(None, b"/", None, _RECURSIVE | _PRIVATE, None))


def mount_disk(path: Path, size: int, again: bool = False) -> None:
    """Put a disk of so many bytes, whole pages, at a directory, or give the one there that size."""
    _checked(
        _libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", _REMOUNT if again else 0, f"size={max(size, 4096)}".encode())
    )


def set_read_only(path: Path, read_only: bool) -> None:
    """Make what lies in a directory unchangeable, for root as well, or changeable again."""
    name = os.fsencode(path)
    if not os.path.ismount(path):
        _checked(_libc.mount(name, name, None, _BIND, None))
    _checked(_libc.mount(None, name, None, _REMOUNT | _BIND | (_READ_ONLY if read_only else 0), None))


def unmount(path: Path) -> None:
    """Take away what is mounted at a directory, whoever has files open there."""
    while os.path.ismount(path):
        _checked(_libc.umount2(os.fsencode(path), 2))


def set_host_name(name: str) -> None:
    """Name the host of this process's namespace."""
    _checked(_libc.sethostname(name.encode(), len(name)))


def mount_processes() -> None:
    """Show at /proc the processes of this process's namespace."""
    _checked(_libc.mount(b"proc", b"/proc", b"proc", 0, None))


def may_mount() -> bool:
    """Whether this machine lets us make such namespaces."""

    def try_() -> int:
        enter(NEW_MOUNTS | NEW_HOST_NAME | NEW_PROCESSES)
        return 0

    _, status = os.waitpid(fork(try_, Path(os.devnull)), 0)
    return status == 0


def limit_descriptors(more: int) -> None:
    """Let this process open so many files more than it has."""
    limit = len(os.listdir("/proc/self/fd")) + more
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def limit_memory(more: int) -> None:
    """Let this process map so many bytes more than it has."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (size, size))

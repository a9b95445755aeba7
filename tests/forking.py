"""Processes of Python that need not import PyTorch and the program again: they are forked from one that has.

A start of Python takes three seconds for these imports, six where an optimizer imports PyTorch's compiler. `Forking`
keeps one process that has imported them, and nothing else of what commands import as they run; it has no threads. Each
process forked from it has a main module, streams, a directory and an environment of its own, and ends as an
interpreter does.
"""

import atexit
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import types
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
NUMBER = struct.Struct("i")
PATIENCE = 120
"""Seconds after which a process counts as hanging."""


class Forked:
    """A process at work; `stderr` and `stdout` are what it has written, once it has ended."""

    def __init__(self, status: socket.socket, folder: Path):
        self._status, self._folder, self.returncode = status, folder, None
        self.pid = self._read()

    def _read(self) -> int:
        data = self._status.recv(NUMBER.size)
        if not data:
            raise RuntimeError("the process that forks others has ended")
        return NUMBER.unpack(data)[0]

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that killed it; None while it runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = self._read()
        return self.returncode

    def wait(self) -> int:
        """How it ends; one that hangs is killed, which fails the test."""
        started = time.monotonic()
        while self.poll() is None:
            if not select.select([self._status], [], [], max(0.0, started + PATIENCE - time.monotonic()))[0]:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"it hangs: {self.stderr}")
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        return (self._folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self._folder / "stderr").read_text()


class Forking:
    """Starts Python code in forked processes, whose output goes to files in a folder.

    Attributes:
        PROGRAM: code that is `python -m signal_reid`.
    """

    PROGRAM = "import runpy; runpy.run_module('signal_reid', run_name='__main__', alter_sys=True)"

    def __init__(self, folder: Path):
        self._folder, self._count = folder, 0
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        theirs.close()

    def start(self, code: str, *arguments: object, path: tuple = (), cwd=None, **environment: str) -> Forked:
        """Start code with arguments; `path` is where it finds modules first."""
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        order = {
            "code": code,
            "arguments": ["signal-reid", *map(str, arguments)],
            "path": [str(place) for place in path],
            "cwd": str(cwd or folder),
            "environment": {**os.environ, **environment},
        }
        (folder / "order").write_text(json.dumps(order))
        ours, status = socket.socketpair()
        with status:
            socket.send_fds(self._orders, [str(folder).encode()], [status.fileno()])
        return Forked(ours, folder)

    def run(self, code: str, *arguments: object, **settings) -> Forked:
        """The same, and wait for its end."""
        process = self.start(code, *arguments, **settings)
        process.wait()
        return process

    def close(self) -> None:
        self._orders.close()
        self._server.wait()


def serve(orders: socket.socket) -> None:
    """Fork a process for every order, until the other end is closed."""
    import torch
    import torch._dynamo  # an optimizer does

    import signal_reid.cli  # noqa: F401 - as every command does
    from signal_reid.training import setup

    torch.set_num_threads(1)
    setup.peak_flops = lambda precision: (1e12, "not measured")  # which takes a second
    while True:
        folder, (*descriptors,), _, _ = socket.recv_fds(orders, 4096, 1)
        if not folder:
            break
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        (status,) = descriptors
        if os.fork() == 0:
            orders.close()
            watch(Path(os.fsdecode(folder)), status)
        os.close(status)
    with suppress(ChildProcessError):
        while os.wait():
            pass


def watch(folder: Path, status: int) -> None:
    """Fork the process itself; tell its number and, at its end, its exit code."""
    pid = os.fork()
    if pid == 0:
        os.close(status)
        become(folder)
    os.write(status, NUMBER.pack(pid))
    _, ended = os.waitpid(pid, 0)
    with suppress(OSError):  # nobody asks any more
        os.write(status, NUMBER.pack(os.waitstatus_to_exitcode(ended)))
    os._exit(0)


def find_installed_again() -> None:
    """Forget which modules and plug-ins the importing process found; some are where `path` leads alone."""
    from signal_reid.runtime.registry import Registry

    importlib.invalidate_caches()
    for module in [module for name, module in sys.modules.items() if name.startswith("signal_reid")]:
        for registry in [value for value in vars(module).values() if isinstance(value, Registry)]:
            vars(registry).pop("_installed", None)


def become(folder: Path) -> None:
    """Run the code of an order, and end as an interpreter does."""
    code = 1
    try:
        order = json.loads((folder / "order").read_text())
        for stream, name in enumerate((os.devnull, "stdout", "stderr")):
            file = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            os.dup2(file, stream)
            os.close(file)
        os.environ.clear()
        os.environ.update(order["environment"])
        os.chdir(order["cwd"])
        sys.argv, sys.path[:0] = order["arguments"], order["path"]
        find_installed_again()
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            exec(compile(order["code"], "<string>", "exec"), main.__dict__)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

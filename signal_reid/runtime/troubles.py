"""Known trouble of the machine, told from what PyTorch and the system raise, in one line that names the remedy."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from signal_reid.runtime.errors import UserError

TRAINING_MEMORY = "raise training.accumulation, set training.gradient_checkpointing=true or lower data.batch_size"
EVALUATION_MEMORY = "lower evaluation.batch_size"

# PyTorch has no types for these; it says them in the text of a RuntimeError.
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*?)[.\s]*(?:It is possible|$)")
_NO_FILES = re.compile(r"[Tt]oo many open files|received 0 items of ancdata")
_NO_SHARED_MEMORY = re.compile(r"</torch_\S+>.*(?:No space left|Cannot allocate)")  # PyTorch's files in /dev/shm
_NO_THREADS = re.compile(r"can't start new thread")
_NO_MEMORY = re.compile(
    r"[Cc]an(?:'t|not) allocate memory|out of memory|bad_alloc|ALLOC_FAILED"
    r"|could not create a (?:primitive|memory)$"  # oneDNN; one that it cannot compute has a primitive *descriptor*
)
_NO_MEMORY_FOR_AN_EXCEPTION = re.compile(r"(?:NULL|error return) without (?:setting an exception|exception set)")


class MachineError(UserError, RuntimeError):
    """The machine has too little of something; the message names what, and the remedy."""


def explain(error: BaseException, memory: str | None = None) -> str | None:
    """What the machine lacks and what to do about it, in one line; None where the error says no such thing.

    Args:
        error: of PyTorch, Python or the system.
        memory: the remedy where memory ran out, if the caller knows one.
    """
    remedy = f": {memory}" if memory else ""
    text = " ".join(str(error).split())
    code = error.errno if isinstance(error, OSError) else None
    spoken = isinstance(error, RuntimeError) and not isinstance(error, UserError)
    if spoken and (dead := _DEAD_WORKER.search(text)):
        return _dead_worker(*dead.groups())
    if code in (errno.EMFILE, errno.ENFILE) or (spoken and _NO_FILES.search(text)):
        return f"too many open files: raise the limit (ulimit -n{_open_files()}) or lower data.workers"
    if spoken and _NO_SHARED_MEMORY.search(text):
        return _no_shared_memory()
    if spoken and _NO_THREADS.search(text):
        return f"no more threads: out of memory or of processes (ulimit -u){remedy}"
    if isinstance(error, torch.cuda.OutOfMemoryError) or (spoken and "CUDA" in text and _NO_MEMORY.search(text)):
        return f"out of memory on the GPU{remedy}"
    if code == errno.ENOMEM or ((spoken or isinstance(error, (MemoryError, SystemError))) and ran_out_of_memory(error)):
        return f"out of memory{remedy}"
    return None


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any library that reads a file tells of the machine's memory, and not of the file."""
    if isinstance(error, SystemError):  # of the interpreter, where there was none for the exception either
        return _NO_MEMORY_FOR_AN_EXCEPTION.search(str(error)) is not None
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error).strip()) is not None


@contextmanager
def explained(memory: str | None = None) -> Iterator[None]:
    """Raise known trouble of the block as `MachineError`; see `explain`.

    Raises:
        MachineError: the machine has too little of something.
    """
    try:
        yield
    except (OSError, RuntimeError, MemoryError, SystemError) as error:
        if (line := explain(error, memory)) is None:
            raise
        raise MachineError(line) from error


def _dead_worker(pids: str, how: str) -> str:
    if "Bus error" in how:  # a write to shared memory that the system could not back
        return _no_shared_memory()
    return (
        f"a data-loading worker died (pid {pids}, {how}); "
        "if the machine ran out of memory, lower data.workers or data.batch_size"
    )


def _no_shared_memory() -> str:
    return (
        "shared memory (/dev/shm) is too small for the workers' batches: enlarge it (docker run --shm-size=8g), "
        "lower data.batch_size or data.workers, or set data.workers=0"
    )


def _open_files() -> str:
    try:
        import resource
    except ImportError:  # Windows
        return ""
    return f", now {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"

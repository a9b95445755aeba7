"""Processes that share one work, as torchrun starts them: each has a GPU of its own, or all are on the CPU."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from signal_reid.runtime.errors import InputError, UserError
from signal_reid.runtime.spare_memory import require_memory_of_threads

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_STARTING = timedelta(minutes=5)  # until all processes are there
_WORKING = timedelta(days=1)  # one process may wait for another's share
_REPORTING = 10.0  # seconds for one process to say why all end
_ROLL_CALL = 3.0  # seconds for the processes that are left to say so
_OF_TRANSPORT = re.compile(r"gloo|nccl|onnection|eer|c10d|ProcessGroup|[Ss]ocket|[Tt]imed? ?out", re.IGNORECASE)
_Item = TypeVar("_Item")


class LostProcessError(UserError, RuntimeError):
    """Another process ended, or cannot be reached, before it gave its part of the work."""


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work; `ALONE` is the only one and needs nothing of torch.distributed.

    Methods that exchange something must be called by all processes, in the same order.

    Args:
        rank: of this process, from 0; process 0 prints and writes.
        size: number of processes.
        local_rank: rank among the processes of this machine, and the number of its GPU.
        local_size: number of processes of this machine.
        store: where they leave each other notes, which outlives a process that ends.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: Store | None = None

    @property
    def first(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def share(self, items: Sequence[_Item], unit: int = 1) -> Sequence[_Item]:
        """This process's part of a sequence: consecutive units, one more or less than another process has.

        Args:
            items: the parts are theirs in the order of ranks, so that gathered results stand in this order.
            unit: number of items that stay together; the last unit may be smaller.

        Returns:
            A slice; empty for the last processes where there are fewer units than processes.
        """
        each, left = divmod(-(-len(items) // unit), self.size)
        start = self.rank * each + min(self.rank, left)
        stop = start + each + (self.rank < left)
        return items[start * unit : stop * unit]

    def gather(self, rows: Tensor | None, device: torch.device | str) -> Tensor | None:
        """The rows of all processes, in the order of ranks, in every process.

        Beside the rows of this process it needs memory for the result, no more.

        Args:
            rows: (n, ...) of any dtype, n of each process its own; none: this process has no rows.
            device: where the rows are, and where the result will be.

        Returns:
            (sum of n, ...), bit for bit what the processes gave; none where no process has rows.

        Raises:
            ValueError: rows of several shapes or dtypes.
            LostProcessError: a process ended. Gloo notices; where NCCL waits, torchrun ends those that are left.
        """
        if self.size == 1:
            return rows
        layouts = self.exchange(None if rows is None else (len(rows), tuple(rows.shape[1:]), rows.dtype))
        kinds = list(dict.fromkeys(layout[1:] for layout in layouts if layout is not None))
        if len(kinds) > 1:
            raise ValueError(f"the rows of all processes must be of one shape and dtype, got {kinds[0]} and {kinds[1]}")
        if not kinds:
            return None
        shape, dtype = kinds[0]
        counts = [0 if layout is None else layout[0] for layout in layouts]
        parts = torch.empty((sum(counts), *shape), dtype=dtype, device=device)
        for rank, part in enumerate(parts.split(counts)):
            if rank == self.rank and rows is not None:
                part.copy_(rows)
            if part.numel():
                with others_at_hand():
                    dist.broadcast(part.view(torch.uint8), src=rank)  # bytes: not every backend knows every dtype
        return parts

    def from_first(self, make: Callable[[], _Item] | None) -> _Item:
        """What process 0 makes, in every process.

        Args:
            make: called in process 0 alone; what it gives is pickled. Its error ends process 0, and so the others.

        Raises:
            LostProcessError: a process ended.
        """
        made = [make() if self.first and make is not None else None]
        if self.size > 1:
            with others_at_hand():
                dist.broadcast_object_list(made, src=0, device=torch.device("cpu"))
        return cast(_Item, made[0])

    def be_patient(self, patience: timedelta) -> None:
        """How long this process waits from now on for the others' part of an exchange."""
        if self.size > 1:
            dist.distributed_c10d._set_pg_timeout(patience)

    def wait(self) -> None:
        """Go on when all processes are here.

        Raises:
            LostProcessError: a process ended.
        """
        if self.size > 1:
            self.exchange(None)

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Process 0 runs the block; then the others do.

        Raises:
            LostProcessError: a process ended.
        """
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    @property
    def name(self) -> str:
        """This process for a reader: its rank and its machine."""
        return f"process {self.rank} of {self.size} on {socket.gethostname()}"

    def who_is_gone(self, reason: str) -> str:
        """Which processes do not answer, where an exchange with them failed; the reason where all do.

        Each process whose exchange failed answers the roll-call. One that was killed does not, nor one that hangs; one
        that failed by itself says so before it ends, and is the one to report.
        """
        if self.store is None:
            return reason
        try:
            silent = _within(2 * _ROLL_CALL, self._silent)
        except RuntimeError:  # the store went with the process that kept it, or with its machine
            place = f" on {os.environ['MASTER_ADDR']}" if "MASTER_ADDR" in os.environ else ""
            return f"process 0, or the launcher beside it{place}, ended or cannot be reached ({reason})"
        return f"{', '.join(silent)} ended without a word or hangs ({reason})" if silent else reason

    def _silent(self) -> list[str]:
        """The names of the processes that do not answer the roll-call."""
        assert self.store is not None
        self.store.set(f"failed/{self.rank}", "")
        silent, end = list(range(self.size)), time.monotonic() + _ROLL_CALL
        while silent and time.monotonic() < end:
            silent = [rank for rank in silent if not self.store.check([f"failed/{rank}"])]
            time.sleep(0.05)
        return [self.store.get(f"name/{rank}").decode() for rank in silent]

    @contextmanager
    def reporting(self) -> Iterator[bool]:
        """Yields whether this process is the one to say, inside the block, why they all end: the first that asks is.

        The others wait until it has said so, so that torchrun does not stop it first.
        """
        store = self.store
        if store is None:
            yield True
            return

        def claim() -> bool:
            store.set(f"failed/{self.rank}", "")
            return bool(store.add("reports", 1) == 1)

        try:
            chosen = _within(_ROLL_CALL, claim)
        except RuntimeError:  # the store cannot be reached
            yield True
            return
        yield chosen
        with suppress(RuntimeError):
            if chosen:
                _within(_ROLL_CALL, lambda: store.set("reported", ""))
            else:
                _within(_REPORTING, lambda: store.wait(["reported"], timedelta(seconds=_REPORTING)))

    def exchange(self, value: Any) -> list[Any]:
        """A value that can be pickled of each process, by rank, in every process.

        Raises:
            LostProcessError: a process ended.
        """
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with others_at_hand():
            dist.all_gather_object(values, value)
        return values


ALONE = Processes()


@contextmanager
def join_processes(patience: timedelta | None = None) -> Iterator[Processes]:
    """Join the processes that torchrun started with this one, and leave them at the end of the block.

    torchrun's environment variables say who they are. Without WORLD_SIZE, or where it is 1, this yields `ALONE` and
    initialises nothing. A process group that is there already is used, and left as it is. Tensors on GPUs travel by
    NCCL, all others by gloo.

    Args:
        patience: how long a process waits for the others' part of an exchange; none: a day.

    Raises:
        ValueError: variables that are missing or are no numbers, or PyTorch was built without torch.distributed.
        LostProcessError: the others do not come.
    """
    size = _variable("WORLD_SIZE", "1")
    if size == 1:
        yield ALONE
        return
    rank, local_rank = _variable("RANK"), _variable("LOCAL_RANK")
    local_size = _variable("LOCAL_WORLD_SIZE", str(size))
    if not dist.is_available():
        raise InputError(f"this PyTorch has no torch.distributed, which {size} processes (WORLD_SIZE) need")
    if dist.is_initialized():
        yield Processes(rank, size, local_rank, local_size)
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    with others_at_hand():
        common, _, _ = next(rendezvous("env://", timeout=_STARTING))
        store = PrefixStore(f"signal-reid-{_name_of_group(common, rank, size)}", common)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience or _WORKING)
    try:
        processes = Processes(rank, size, local_rank, local_size, store)
        store.set(f"name/{rank}", f"{processes.name} (pid {os.getpid()})")
        yield processes
    finally:
        if torch.__version__ < "2.8":  # gloo's threads may still be at work, and its destructor waits for them for ever
            time.sleep(0.2)
        dist.destroy_process_group()


def _within(seconds: float, ask: Callable[[], _Item]) -> _Item:
    """What the store answers, without PyTorch's pages on the standard error where it does not.

    The store's own calls wait for as long as TCP does, a quarter of an hour where a link is down.

    Raises:
        RuntimeError: it cannot be reached, or does not answer in time.
    """
    answer: Future[_Item] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:
            answer.set_exception(error)

    sys.stderr.flush()
    shown, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)  # C++ writes there
        require_memory_of_threads(1)
        Thread(target=run, daemon=True).start()
        return answer.result(seconds)
    except FutureTimeoutError:
        raise RuntimeError(f"the store does not answer within {seconds:g} seconds") from None
    finally:
        os.dup2(shown, 2)
        os.close(shown)
        os.close(nowhere)


def _name_of_group(store: Store, rank: int, size: int) -> str:
    """A name that these processes agree on, and that nobody had before.

    torchrun may keep one store for all its restarts, with the notes of processes that are gone. So each process comes
    with a name of its own, and process 0 answers to that until all have heard it; it may have answered an old name.

    Raises:
        RuntimeError: not all processes come.
    """
    own, end = uuid4().hex, time.monotonic() + _STARTING.total_seconds()
    if rank:
        store.set(f"arrived/{rank}", own)
        name: str = store.get(f"answer/{own}").decode()
        store.set(f"{name}/{rank}", "")
        return name
    for other in range(1, size):
        while not store.check([f"{own}/{other}"]):
            if time.monotonic() > end:
                raise RuntimeError(f"process {other} of {size} does not come")
            store.set(f"answer/{store.get(f'arrived/{other}').decode()}", own)
            time.sleep(0.02)
    return own


def launched() -> tuple[int, int]:
    """Rank of this process and number of processes, as torchrun's environment variables say; 0 and 1 without them.

    Raises:
        ValueError: variables that are no numbers.
    """
    return _variable("RANK", "0"), _variable("WORLD_SIZE", "1")


def _variable(name: str, default: str | None = None) -> int:
    text = os.environ.get(name, default)
    if text is None:
        raise InputError(f"{name} must be set where WORLD_SIZE is ({os.environ['WORLD_SIZE']}); torchrun sets them")
    if not text.isdecimal():
        raise InputError(f"{name} must be a whole number, got {text!r}")
    return int(text)


@contextmanager
def others_at_hand(mixed: bool = False) -> Iterator[None]:
    """Raise what torch.distributed says of a process that is gone as one kind of error.

    Args:
        mixed: the block computes as well, so that only an error in the words of a transport is one.

    Raises:
        LostProcessError: another process ended or cannot be reached.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if isinstance(error, UserError) or (mixed and not _OF_TRANSPORT.search(str(error))):
            raise
        reason = re.sub(r"^\[\S+\] ", "", str(error)).partition("\n")[0].partition(". ")[0]  # without the source's line
        raise LostProcessError(f"another process ended or cannot be reached ({reason})") from None

"""Processes that share one work, as torchrun starts them: each has a GPU of its own, or all are on the CPU."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from signal_reid.runtime.errors import InputError, UserError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_STARTING = timedelta(minutes=5)  # until all processes are there
_WORKING = timedelta(days=1)  # one process may wait for another's share
_REPORTING = timedelta(seconds=10)
_ROLL_CALL = 3.0  # seconds for the processes that are left to say so
_OF_TRANSPORT = re.compile(r"gloo|nccl|onnection|eer|c10d|ProcessGroup|[Ss]ocket|[Tt]imed? ?out", re.IGNORECASE)
_joins = count()  # each leaves its notes under a name of its own
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
            self.store.set(f"failed/{self.rank}", "")
            end = time.monotonic() + _ROLL_CALL
            while time.monotonic() < end and (silent := [r for r in range(self.size) if not self._answered(r)]):
                time.sleep(0.05)
            if not silent:
                return reason
            names = ", ".join(self.store.get(f"name/{rank}").decode() for rank in silent)
        except RuntimeError:  # the store went with the process that kept it, or with its machine
            return f"process 0, or the launcher beside it, ended or cannot be reached ({reason})"
        return f"{names} ended without a word or hangs ({reason})"

    def _answered(self, rank: int) -> bool:
        assert self.store is not None
        return bool(self.store.check([f"failed/{rank}"]))

    @contextmanager
    def reporting(self) -> Iterator[bool]:
        """Yields whether this process is the one to say, inside the block, why they all end: the first that asks is.

        The others wait until it has said so, lest their end has it stopped before.
        """
        try:
            chosen = self.store is None or self.store.add("reports", 1) == 1
            if self.store is not None:
                self.store.set(f"failed/{self.rank}", "")
        except RuntimeError:  # the store went with the process that kept it
            chosen = True
        yield chosen
        if self.store is None:
            return
        try:
            if chosen:
                self.store.set("reported", "")
            else:
                self.store.wait(["reported"], _REPORTING)
        except RuntimeError:
            return

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
        store = PrefixStore(f"signal-reid-{next(_joins)}", common)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience or _WORKING)
    try:
        processes = Processes(rank, size, local_rank, local_size, store)
        store.set(f"name/{rank}", f"{processes.name} (pid {os.getpid()})")
        yield processes
    finally:
        if torch.__version__ < "2.8":  # gloo's threads may still be at work, and its destructor waits for them for ever
            time.sleep(0.2)
        dist.destroy_process_group()


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

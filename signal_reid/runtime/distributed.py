"""Processes that share one work, as torchrun starts them: each has a GPU of its own, or all are on the CPU."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from signal_reid.runtime.errors import InputError, UserError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_STARTING = timedelta(minutes=5)  # until all processes are there
_WORKING = timedelta(days=1)  # one process may wait for another's share
_REPORTING = timedelta(seconds=10)
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
                with _others_at_hand():
                    dist.broadcast(part.view(torch.uint8), src=rank)  # bytes: not every backend knows every dtype
        return parts

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

    @contextmanager
    def reporting(self) -> Iterator[bool]:
        """Yields whether this process is the one to say, inside the block, why they all end: the first that asks is.

        The others wait until it has said so, lest their end has it stopped before.
        """
        try:
            chosen = self.store is None or self.store.add("reports", 1) == 1
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
        with _others_at_hand():
            dist.all_gather_object(values, value)
        return values


ALONE = Processes()


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Join the processes that torchrun started with this one, and leave them at the end of the block.

    torchrun's environment variables say who they are. Without WORLD_SIZE, or where it is 1, this yields `ALONE` and
    initialises nothing. A process group that is there already is used, and left as it is. Tensors on GPUs travel by
    NCCL, all others by gloo.

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

    with _others_at_hand():
        common, _, _ = next(rendezvous("env://", timeout=_STARTING))
        store = PrefixStore(f"signal-reid-{next(_joins)}", common)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_WORKING)
    try:
        yield Processes(rank, size, local_rank, local_size, store)
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
def _others_at_hand() -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = re.sub(r"^\[\S+\] ", "", str(error)).partition("\n")[0].partition(". ")[0]  # without the source's line
        raise LostProcessError(f"another process ended or cannot be reached ({reason})") from None

"""Many small operators in parallel without a barrier at each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from signal_reid.runtime.spare_memory import require_memory_of_threads

Part = TypeVar("Part")
Result = TypeVar("Result")
_PATIENCE = 1.0  # seconds between two looks at whether the threads of a pool live
_PARTS_OF_THREAD = 4  # so that the last part is short where one thread has half of another's time


def map_in_pool(function: Callable[[Part], Result], parts: Sequence[Part], threads: int) -> Iterator[Result]:
    """Yield the results of `function` for each part, in order, from a pool of threads that ends with this iterator.

    Unlike those of `concurrent.futures`, its threads wait for no lock that the main thread may leave locked where a
    signal interrupts it, and one that has no memory for a result is out of memory, not a hang. No part is begun before
    all threads are there, so that none of them lacks the memory to begin that another takes.

    Args:
        function: called on several threads at once; on the caller's where one is enough.
        parts: what it is called with.
        threads: at most so many.

    Raises:
        MemoryError, RuntimeError: there is no memory, or there are no threads, for so many.
    """
    if min(threads, len(parts)) < 2:
        yield from map(function, parts)
        return
    pool = _Pool(function, parts)
    try:
        pool.begin(min(threads, len(parts)))
        yield from pool.results()
    finally:
        pool.end()


class _Outcome(NamedTuple):
    at: int
    result: Any = None
    error: BaseException | None = None


class _Pool(Generic[Part, Result]):
    def __init__(self, function: Callable[[Part], Result], parts: Sequence[Part]) -> None:
        self._function = function
        self._parts = parts
        self._threads: list[Thread] = []
        self._ended = False
        self._to_do: SimpleQueue[int | None] = SimpleQueue()
        self._done: SimpleQueue[_Outcome] = SimpleQueue()

    def begin(self, count: int) -> None:
        require_memory_of_threads(count)
        for _ in range(count):
            self._threads.append(Thread(target=self._work, daemon=True))
            self._threads[-1].start()
        for index in range(len(self._parts)):
            self._to_do.put(index)
        self._dismiss()

    def results(self) -> Iterator[Result]:
        early: dict[int, _Outcome] = {}
        for index in range(len(self._parts)):
            while index not in early:
                outcome = self._next()
                early[outcome.at] = outcome
            outcome = early.pop(index)
            if outcome.error is not None:
                raise outcome.error
            yield outcome.result

    def end(self) -> None:
        """Leave out the parts that are not begun, and wait for those that are."""
        self._ended = True
        self._dismiss()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _dismiss(self) -> None:
        for _ in self._threads:
            self._to_do.put(None)

    def _next(self) -> _Outcome:
        while True:
            at_work = any(thread.is_alive() for thread in self._threads)
            try:
                return self._done.get(timeout=_PATIENCE if at_work else 0)
            except Empty:
                if not at_work:
                    raise MemoryError("a thread ended without a result") from None

    def _work(self) -> None:
        with suppress(MemoryError, SystemError):  # of these lines themselves
            while (index := self._to_do.get()) is not None and not self._ended:
                try:
                    self._done.put(_Outcome(index, self._function(self._parts[index])))
                except BaseException as error:
                    self._done.put(_Outcome(index, error=error))


def map_on_threads(function: Callable[[Part], Result], parts: Iterable[Part], device: torch.device) -> list[Result]:
    """The results of `function` for each part, in order, as `stream_on_threads` yields them."""
    return list(stream_on_threads(function, parts, device))


def stream_on_threads(
    function: Callable[[Part], Result], parts: Iterable[Part], device: torch.device
) -> Iterator[Result]:
    """Yield the results of `function` for each part, in order; on a CPU, the parts are shared among PyTorch's threads.

    An operator that splits its work waits for the last of its threads. Where other processes use the cores, that thread
    may have to wait for its turn, and each of a thousand short operators waits so. Here a thread computes whole parts,
    takes the next when it is done, and waits for nobody; its operators do not split their work.

    Args:
        function: called on several threads at once on a CPU, in the inference mode of the caller and without gradients.
        parts: several times as many as there are threads keep all of them busy where some get less of a core.
        device: where the function computes; on another than a CPU the parts follow each other.
    """
    parts, threads = list(parts), torch.get_num_threads()
    if device.type != "cpu" or min(threads, len(parts)) < 2:
        yield from map(function, parts)
        return
    inference = torch.is_inference_mode_enabled()

    def call(part: Part) -> Result:
        torch.set_num_threads(1)
        with torch.inference_mode(inference), torch.set_grad_enabled(False):
            return function(part)

    try:
        torch.set_num_threads(1)  # what the caller does with a result meanwhile does not wait for a core either
        yield from map_in_pool(call, parts, threads)
    finally:
        torch.set_num_threads(threads)  # what threads that start later take over


def split_rows(count: int, at_most: int, device: torch.device) -> list[slice]:
    """Slices of `count` rows, none larger than `at_most`, and on a CPU as many as keep PyTorch's threads busy."""
    if device.type == "cpu" and torch.get_num_threads() > 1:
        at_most = min(at_most, -(-count // (_PARTS_OF_THREAD * torch.get_num_threads())))
    at_most = max(1, at_most)
    return [slice(start, min(start + at_most, count)) for start in range(0, count, at_most)]

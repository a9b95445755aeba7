"""Many small operators in parallel without a barrier at each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Event
from threading import enumerate as enumerate_threads
from typing import TypeVar

import torch

from signal_reid.runtime.spare_memory import require_memory_of_threads

Part = TypeVar("Part")
Result = TypeVar("Result")
_PATIENCE = 1.0  # seconds between two looks at whether the threads of a pool still live
_PARTS_OF_THREAD = 4  # so that the last part is short where one thread has half of another's time


def map_in_pool(function: Callable[[Part], Result], parts: Sequence[Part], threads: int) -> Iterator[Result]:
    """Yield the results of `function` for each part, in order, from a pool of threads that ends with this iterator.

    No part is begun before all threads are there, so that none of them lacks the memory to begin that another takes.

    Args:
        function: called on several threads at once.
        parts: what it is called with.
        threads: at most so many.

    Raises:
        MemoryError, RuntimeError: there is no memory, or there are no threads, for so many.
    """
    threads, all_there = min(threads, len(parts)), Event()
    require_memory_of_threads(threads)
    name = f"{function!r} in pool {id(all_there)}"

    def call(part: Part) -> Result:
        all_there.wait()
        return function(part)

    pool = ThreadPoolExecutor(max(1, threads), name)
    try:
        try:
            futures = [pool.submit(call, part) for part in parts]
        finally:
            all_there.set()
        pool.shutdown(wait=False)  # the threads end with the last part
        yield from (_result(future, name) for future in futures)
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future[Result], name: str) -> Result:
    """What a thread computes; one that has no memory even to say so ends, and leaves its future as it is."""
    while not future.done() and not wait((future,), _PATIENCE).done:
        at_work = any(thread.is_alive() for thread in enumerate_threads() if thread.name.startswith(name))
        if not at_work and not future.done():
            raise MemoryError("a thread of a pool ended without a result")
    return future.result()


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

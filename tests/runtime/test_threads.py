"""Work that is shared among threads keeps its order, and leaves PyTorch's settings as they were."""

import threading

import pytest
import torch

from signal_reid.runtime import threads
from signal_reid.runtime.threads import map_in_pool, map_on_threads, split_rows, stream_on_threads

CPU = torch.device("cpu")


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_are_in_order_and_each_thread_computes_alone(three_threads):
    results = map_on_threads(lambda part: (part, torch.get_num_threads()), range(20), CPU)
    assert results == [(part, 1) for part in range(20)]
    assert torch.get_num_threads() == 3


def test_parts_see_the_inference_mode_of_the_caller(three_threads):
    with torch.inference_mode():
        total = torch.zeros(4)
        map_on_threads(lambda part: total[part].add_(part), range(4), CPU)
    assert total.tolist() == [0, 1, 2, 3]


def test_an_error_of_a_part_is_raised_and_the_threads_are_given_back(three_threads):
    with pytest.raises(ZeroDivisionError):
        map_on_threads(lambda part: 1 // part, [1, 0, 2], CPU)
    assert torch.get_num_threads() == 3


def test_a_result_is_there_before_the_last_part_and_leaving_early_gives_the_threads_back(three_threads):
    results = stream_on_threads(lambda part: part, range(20), CPU)
    assert next(results) == 0
    assert torch.get_num_threads() == 1  # the caller's work on a result is not split either
    results.close()
    assert torch.get_num_threads() == 3


def test_no_part_is_begun_before_all_threads_are_there():
    before = threading.active_count()
    counts = list(map_in_pool(lambda part: threading.active_count() - before, range(9), 3))
    assert counts[0] == 3
    assert threading.active_count() == before


def test_a_thread_that_cannot_begin_ends_the_others(monkeypatch):
    before, starts, start = threading.active_count(), iter(range(5)), threading.Thread.start

    def start_two(thread):
        if next(starts) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    with pytest.raises(RuntimeError, match="new thread"):
        list(map_in_pool(abs, range(9), 3))
    assert threading.active_count() == before


def test_a_thread_that_dies_without_a_result_is_no_hang_and_says_nothing(monkeypatch, capsys):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(threads, "_PATIENCE", 0.01)
    monkeypatch.setattr(threads, "_Outcome", fail)
    with pytest.raises(MemoryError):
        list(map_in_pool(abs, range(9), 3))
    assert capsys.readouterr().err == ""


def test_whatever_a_part_raises_reaches_the_caller_and_ends_the_pool():
    before, begun = threading.active_count(), []

    def fail(part):
        begun.append(part)
        if part == 3:
            raise SystemExit(part)
        return part

    results = map_in_pool(fail, range(1000), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(SystemExit):
        next(results)
    assert threading.active_count() == before


def test_parts_that_are_not_begun_are_left_out(monkeypatch):
    begun, held = [], threading.Event()

    def wait(part):
        begun.append(part)
        held.wait(part and 10)
        return part

    results = map_in_pool(wait, range(1000), 2)
    next(results)
    threading.Timer(0.05, held.set).start()
    results.close()
    assert len(begun) <= 4


@pytest.mark.parametrize("where", ["begin", "_next", "_dismiss"])
def test_an_interruption_leaves_no_thread_behind(where, monkeypatch):
    before, called = threading.active_count(), []

    def interrupt(pool, *arguments):
        if called:
            return whole(pool, *arguments)
        called.append(True)
        raise KeyboardInterrupt

    whole = getattr(threads._Pool, where)
    monkeypatch.setattr(threads._Pool, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(map_in_pool(abs, range(9), 3))
    assert threading.active_count() == before


@pytest.mark.parametrize(("count", "at_most", "sizes"), [(50, 100, [5] * 10), (30, 2, [2] * 15), (2, 0, [1, 1])])
def test_rows_are_split_for_every_thread(three_threads, count, at_most, sizes):
    assert [part.stop - part.start for part in split_rows(count, at_most, CPU)] == sizes

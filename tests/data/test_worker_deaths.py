"""A worker's death is raised where its batch is waited for, with its own words, and nowhere else."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from signal_reid.data import worker_deaths
from signal_reid.data.worker_deaths import raise_deaths_where_batches_are_waited_for, told_of_deaths

DEATH = "DataLoader worker (pid 7) is killed by signal: Killed."


@pytest.fixture
def deaths(monkeypatch):
    """PyTorch's handler as if a worker had died; gives what is kept of it."""

    def raise_death(*_):
        raise RuntimeError(DEATH)

    kept = []
    monkeypatch.setattr(worker_deaths, "_deaths", kept)
    monkeypatch.setattr(worker_deaths.signal_handling, "_set_SIGCHLD_handler", lambda: None)
    before = signal.signal(signal.SIGCHLD, raise_death)
    raise_deaths_where_batches_are_waited_for()
    yield kept
    signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def test_a_death_that_nobody_waits_at_is_kept(deaths):
    os.kill(os.getpid(), signal.SIGCHLD)
    assert [str(death) for death in deaths] == [DEATH]


def test_a_death_ends_the_waiting_for_a_batch(deaths):
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGCHLD)).start()
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="killed by signal"):
        multiprocessing.Queue().get(timeout=20)
    assert time.monotonic() - started < 10


def test_what_pytorch_finds_out_later_is_told_in_the_words_of_the_death(deaths):
    def lose_a_batch():
        yield 1
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    os.kill(os.getpid(), signal.SIGCHLD)
    batches = told_of_deaths(lose_a_batch())
    assert next(batches) == 1
    with pytest.raises(RuntimeError, match="killed by signal"):
        next(batches)
    assert deaths == []


def test_an_error_of_another_kind_is_left_as_it_is(deaths):
    def fail():
        yield from ()
        raise RuntimeError("size mismatch")

    os.kill(os.getpid(), signal.SIGCHLD)
    with pytest.raises(RuntimeError, match="size mismatch"):
        next(told_of_deaths(fail()))


def test_the_handler_is_put_there_once(deaths):
    handler = signal.getsignal(signal.SIGCHLD)
    raise_deaths_where_batches_are_waited_for()
    assert signal.getsignal(signal.SIGCHLD) is handler

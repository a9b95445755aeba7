"""Batches come in order; on CUDA the next copy is under way before the current batch is used."""

from contextlib import contextmanager

import pytest
import torch

from signal_reid.data import Batch, prefetch
from signal_reid.data.prefetching import _side_stream


def batch_of(number):
    return Batch(torch.full((2, 3), number, dtype=torch.uint8), *(torch.full((2,), number) for _ in range(4)))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_on_the_cpu_batches_pass_through_untouched(count):
    given = [batch_of(number) for number in range(count)]
    taken = list(prefetch(given, "cpu"))
    assert len(taken) == count
    assert all(a is b for one, other in zip(taken, given, strict=True) for a, b in zip(one, other, strict=True))


def test_on_the_cpu_nothing_is_taken_ahead():
    taken = []
    batches = prefetch((taken.append(number) or batch_of(number) for number in range(3)), "cpu")
    next(batches)
    assert taken == [0]


@pytest.fixture
def record(monkeypatch):
    """Stand-ins for CUDA's streams that note what happens on which, in order."""
    events = []

    class Tensor:
        def __init__(self, number):
            self.number = number

        def record_stream(self, stream):
            events.append(("keep", self.number, stream.name))

    class Loaded:
        def __init__(self, number):
            self.number = number

        def to(self, device):
            events.append(("copy", self.number, current[-1].name))
            return [Tensor(self.number)]

    class Stream:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            return f"event {sum(kind == 'copy' for kind, *_ in events) - 1}"

        def wait_event(self, event):
            events.append(("wait", event, self.name))

    current = [Stream("main")]

    @contextmanager
    def stream(chosen):
        current.append(chosen)
        yield
        current.pop()

    monkeypatch.setattr("torch.cuda.Stream", lambda device: Stream("side"))
    monkeypatch.setattr("torch.cuda.stream", stream)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: current[-1])
    _side_stream.cache_clear()
    yield events, [Loaded(number) for number in range(3)]
    _side_stream.cache_clear()


def test_on_cuda_the_next_copy_starts_before_the_current_batch_is_used(record):
    events, loaded = record
    for batch in prefetch(loaded, "cuda"):
        events.append(("use", batch[0].number, "main"))
    assert [event[:2] for event in events if event[0] in ("copy", "use")] == [
        ("copy", 0),
        ("copy", 1),
        ("use", 0),
        ("copy", 2),
        ("use", 1),
        ("use", 2),
    ]
    assert {name for kind, _, name in events if kind == "copy"} == {"side"}


def test_on_cuda_a_batch_is_used_behind_its_copy_and_kept_until_then(record):
    events, loaded = record
    for batch in prefetch(loaded, "cuda"):
        number = batch[0].number
        assert events[-2:] == [("wait", f"event {number}", "main"), ("keep", number, "main")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gets_what_was_loaded_whatever_it_is_busy_with():
    given = [Batch(*(torch.full((1 << 20,), number).pin_memory() for _ in range(5))) for number in range(8)]
    sums = []
    for batch in prefetch(given, "cuda"):
        torch.cuda._sleep(10_000_000)
        sums.append(sum(tensor.double().mean() for tensor in batch))
        del batch
    assert [value.item() for value in sums] == [5.0 * number for number in range(8)]

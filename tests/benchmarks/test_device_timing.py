"""Times on a GPU: the device is busy long enough, and the cache is filled by reading. A clock stands in for the GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

RATE = 1.5e9  # cycles per second
CPU = torch.device("cpu")


class Gpu:
    """A queue with a clock of its own: spins take their cycles, steps what they say."""

    def __init__(self, monkeypatch, timing):
        self.device = self.host = 0.0
        self.spun = []
        monkeypatch.setattr("torch.cuda._sleep", self.sleep, raising=False)
        monkeypatch.setattr("torch.cuda.synchronize", self.synchronize)
        monkeypatch.setattr("torch.cuda.Event", lambda enable_timing: Event(self))
        monkeypatch.setattr("torch.cuda.device", lambda device: torch.no_grad())
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.host)

    def queue(self, seconds):
        """Work begins when it is queued and what was before is done."""
        self.device = max(self.device, self.host) + seconds

    def sleep(self, cycles):
        self.spun.append(cycles)
        self.queue(cycles / RATE)

    def synchronize(self):
        self.host = max(self.host, self.device)

    def step(self, on_host, on_device):
        """A step of two kernels, the second of which the host queues late."""

        def run():
            self.queue(on_device / 2)
            self.host += on_host
            self.queue(on_device / 2)

        return run


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.gpu.queue(0.0)
        self.at = self.gpu.device

    def synchronize(self):
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def timing(script):
    return script("harness.device_timing")


@pytest.fixture
def gpu(monkeypatch, timing):
    monkeypatch.setattr(timing, "FILLED_BYTES", 4096)
    return Gpu(monkeypatch, timing)


def test_the_rate_of_the_spin_is_measured(gpu, timing):
    assert timing.cycles_per_second() == pytest.approx(RATE)


def test_a_step_that_the_host_queues_slowly_has_the_device_s_time_alone(gpu, timing):
    steps = {"slow to queue": gpu.step(3e-3, 2e-5), "quick to queue": gpu.step(1e-6, 4e-5)}
    times = timing.device_times(steps, 4, 1, CPU)
    assert {name: len(seconds) for name, seconds in times.items()} == {"slow to queue": 4, "quick to queue": 4}
    assert times["slow to queue"] == pytest.approx([2e-5] * 4)
    assert times["quick to queue"] == pytest.approx([4e-5] * 4)
    spun = sorted({cycles for cycles in gpu.spun if cycles != timing.CALIBRATING_CYCLES})
    assert spun == pytest.approx([timing.LEAST_SECONDS * RATE, 2 * 3e-3 * RATE], rel=1e-6, abs=1)


def test_without_the_spin_the_host_s_time_would_be_in_it(gpu, timing, monkeypatch):
    monkeypatch.setattr(timing, "spin_cycles", lambda host, rate: 0)
    (seconds,) = timing.device_times({"slow to queue": gpu.step(3e-3, 2e-5)}, 1, 0, CPU)["slow to queue"]
    assert seconds > 2.9e-3


def test_before_a_step_the_cache_is_filled_by_reading(gpu, timing, monkeypatch):
    called = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append((function._schema.name, function._schema.is_mutable))
            return function(*args, **(kwargs or {}))

    with Recorder():
        timing.device_times({"step": gpu.step(0.0, 1e-5)}, 2, 0, CPU)
    assert called == [("aten::zeros", False), ("aten::sum", False), ("aten::sum", False)]


def test_modules_that_a_larger_whole_queues_are_timed_so(gpu, timing, script, monkeypatch):
    common = script("harness.common")
    monkeypatch.setattr(common, "device_times", lambda *arguments: arguments)
    steps = {"step": lambda: None}
    assert common.interleave(steps, 3, 1, torch.device("cuda"), queued=True) == (steps, 3, 1, torch.device("cuda"))
    assert list(common.interleave(steps, 3, 1, CPU, queued=True)) == ["step"]

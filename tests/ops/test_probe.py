"""A GPU that the native core does not fit is noticed before the first call; the emulator's has trouble planted."""

import ctypes
import logging

import pytest
import torch

from signal_reid import ops
from signal_reid.ops import backend as backends
from signal_reid.ops import dispatch
from signal_reid.ops.cuda import core

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the core is not emulated beside a GPU")

OLD_DRIVER, NO_KERNEL_IMAGE = 35, 209  # of cudaError_t
TOO_OLD = (
    "CUDA driver version is insufficient for CUDA runtime version "
    "(the native core is built with CUDA 13.0, the driver serves CUDA 12.4 at most)"
)


@pytest.fixture
def library(emulated_core):
    return ctypes.CDLL(emulated_core.__file__)


@pytest.fixture
def plant(emulated_core, library):
    """Give the emulated device a trouble and put it in force, as if it had not been asked before."""

    def put(error):
        library.simt_plant_trouble(0, error)
        core._reason_of.cache_clear()
        dispatch._log_fallback_once.cache_clear()

    with core.use(emulated_core):
        yield put
    put(0)


def call():
    return ops.quick_gelu(torch.ones(2))


@pytest.mark.parametrize("error", [OLD_DRIVER, NO_KERNEL_IMAGE])
def test_what_cuda_has_against_a_device_is_what_info_says(plant, error, capsys):
    from signal_reid.cli.info import info

    plant(error)
    reason = core.native().probe(0)
    assert error == NO_KERNEL_IMAGE or reason == TOO_OLD
    assert dispatch.describe(start=True)["backend cuda"] == f"not available: {reason}"
    info()
    assert reason[:20] in capsys.readouterr().out
    plant(0)
    assert dispatch.describe(start=True)["backend cuda"] == "available"


def test_auto_goes_on_to_the_next_backend_and_says_so_once(plant, monkeypatch, caplog):
    monkeypatch.setattr(backends, "preference", lambda tensor: ("cuda", "reference"))
    plant(OLD_DRIVER)
    with caplog.at_level(logging.WARNING):
        first, second = call(), call()
    assert torch.equal(first, second)
    assert [record.getMessage() for record in caplog.records] == [f"backend cuda is not used: {TOO_OLD}"]


def test_an_explicit_choice_raises_with_that_reason(plant):
    plant(OLD_DRIVER)
    with ops.use_backend("cuda"), pytest.raises(ops.BackendError) as caught:
        call()
    assert str(caught.value) == f"backend cuda cannot serve activation on cpu: {TOO_OLD}"


def test_a_device_is_asked_once(plant, monkeypatch):
    plant(0)
    asked, probe = [], core.native().probe
    monkeypatch.setattr(core.native(), "probe", lambda device: asked.append(device) or probe(device))
    with ops.use_backend("cuda"):
        call(), call()
    assert asked == [0]


def test_a_device_that_is_not_there_is_refused_by_the_probe_and_by_a_launch(emulated_core):
    assert emulated_core.probe(7).startswith("invalid device ordinal (")
    with pytest.raises(RuntimeError, match=r"^quick_gelu: invalid device ordinal$"):
        emulated_core.quick_gelu({"x": 0, "y": 0, "size": 0, "dtype": 0, "device": 7, "stream": 0})


def test_a_launch_runs_on_its_device_and_leaves_the_current_one(emulated_core, library):
    x = torch.ones(4)
    for device, runs_on in ((1, 1), (0, 0), (-1, 0)):  # none is the current one, which is the first
        fields = {"x": x.data_ptr(), "y": x.data_ptr(), "size": 4, "dtype": 0, "device": device, "stream": 0}
        emulated_core.quick_gelu(fields)
        assert library.simt_device_of_last_kernel() == runs_on


def test_a_core_that_is_built_for_no_gpu_serves_the_host_where_it_is_chosen(emulated_core, monkeypatch):
    monkeypatch.setattr(core, "_native", lambda: emulated_core)
    monkeypatch.setattr(core, "_reason_against_native", lambda: None)
    assert dispatch.unavailable_reason("cuda") is None
    with ops.use_backend("cuda"):
        torch.testing.assert_close(call(), torch.ones(2) * torch.sigmoid(torch.tensor(1.702)))


class Started:
    """A torch.cuda with two GPUs, of which this process uses the second."""

    def __init__(self, monkeypatch, started):
        self.asked = []
        monkeypatch.setattr(core, "reason_against_build", lambda: None)
        monkeypatch.setattr(core, "on_host", lambda: False)
        monkeypatch.setattr(core, "reason_against_device", lambda index: self.asked.append(index) or "a reason")
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        monkeypatch.setattr("torch.cuda.is_initialized", lambda: bool(started))
        monkeypatch.setattr("torch._C._cuda_hasPrimaryContext", started.__contains__, raising=False)


def test_only_who_asks_for_it_starts_a_gpu(monkeypatch):
    cuda = Started(monkeypatch, started=[])
    assert core.unavailable_reason() is None
    assert cuda.asked == []
    assert core.unavailable_reason(start=True) == "a reason"
    assert cuda.asked == [0, 1]


def test_a_gpu_that_is_in_use_is_asked_all_the_same(monkeypatch):
    cuda = Started(monkeypatch, started=[1])
    assert core.unavailable_reason() is None
    assert cuda.asked == [1]


def test_a_tensor_of_the_host_starts_no_gpu(monkeypatch):
    cuda = Started(monkeypatch, started=[])
    with ops.use_backend("cuda"), pytest.raises(ops.BackendError, match="the tensor is not on a GPU"):
        call()
    assert cuda.asked == []

"""An explicit backend serves what it has or raises; auto falls back and says so once."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from signal_reid import ops
from signal_reid.ops import backend as backends
from signal_reid.ops import dispatch, triton
from signal_reid.ops.cuda import core, token_selection

BEYOND_SHARED_MEMORY = torch.zeros(1, 2, 3, 8192), torch.zeros(1, 2, 8192), torch.zeros(1, 2, 8192), 1, 1


def expanded(*shape):
    """Zeros of any size, in the memory of one."""
    return torch.zeros([1] * len(shape)).expand(shape)


BEYOND_CUDA = {
    "shared memory": (
        lambda: ops.select_tokens(*BEYOND_SHARED_MEMORY),
        r"tokens of shape \(1, 2, 3, 8192\): the scores and queries of one sample take 131152 bytes of shared memory, "
        "the GPU has 101376; use backend triton or reference",
    ),
    "samples": (
        lambda: ops.select_tokens(expanded(2**31, 2, 1, 1), *[expanded(2**31, 2, 1)] * 2, 1, 1),
        r"tokens of shape \(2147483648, 2, 1, 1\): at most 2147483647 samples; divide the batch or use",
    ),
    "channels": (
        lambda: ops.add_layer_norm(expanded(2, 5128), None, expanded(5128), expanded(5128)),
        "cannot normalise 5128 channels: at most 5120; use backend triton or reference",
    ),
    "rows": (
        lambda: ops.add_layer_norm(expanded(2**31, 1), None, expanded(1), expanded(1)),
        "cannot normalise 2147483648 rows: at most 2147483647; divide them or use backend reference",
    ),
    "a map": (
        lambda: ops.deformable_sample(expanded(1, 2**31, 1), expanded(1, 2, 2), (2**31, 1)),
        r"tokens of shape \(1, 2147483648, 1\) at offsets of shape \(1, 2, 2\): a map has at most 2147479552 tokens",
    ),
    "maps": (
        lambda: ops.deformable_sample(expanded(2**32, 1, 1), expanded(2**32, 2, 2), (1, 1)),
        "they take 6442450944 blocks, a launch has at most 2147483647; divide the batch or use backend reference",
    ),
    "columns": (
        lambda: ops.gramian_volume(expanded(1, 1), *[expanded(2**31, 1)] * 2),
        r"cannot pair anchor of shape \(1, 1\) with others of shape \(2147483648, 1\): they take 2147483649 blocks",
    ),
}


def call():
    return ops.quick_gelu(torch.ones(2))


@pytest.fixture
def as_on_a_gpu(monkeypatch, emulated_core):
    """Auto tries the kernels for tensors of the host as well, and forgets what it has logged."""
    monkeypatch.setattr(backends, "preference", lambda tensor: ("cuda", "triton", "reference"))
    dispatch._log_fallback_once.cache_clear()
    with core.use(emulated_core):
        yield


def modules_that_serve(monkeypatch):
    """Where each later call is served, as (backend, operator)."""
    seen, module = [], dispatch.module
    monkeypatch.setattr(dispatch, "module", lambda *names: seen.append(names) or module(*names))
    return seen


def test_auto_serves_a_cpu_from_its_own_backend_and_else_from_the_reference(monkeypatch):
    seen = modules_that_serve(monkeypatch)
    assert ops.current_backend() == "auto"
    call()
    ops.gramian_volume(*torch.ones(2, 1, 3))
    assert seen == [("cpu", "activation"), ("reference", "gramian")]


def on(device):
    return SimpleNamespace(is_cuda=device == "cuda", device=torch.device(device), dtype=torch.float32)


@pytest.mark.parametrize(
    ("device", "order"),
    [
        ("cuda", ("cuda", "triton", "reference")),
        ("cpu", ("cpu", "reference")),
        ("mps", ("reference",)),
        ("xpu", ("reference",)),
    ],
)
def test_auto_tries_what_is_written_for_a_device_and_last_the_reference(device, order):
    assert backends.preference(on(device)) == order


def test_the_cpu_s_backend_serves_another_device_where_it_is_chosen(monkeypatch):
    served = []
    monkeypatch.setattr(dispatch.module("cpu", "activation"), "forward", served.append)
    tensor = on("mps")
    with ops.use_backend("cpu"):
        dispatch.call("activation", "forward", tensor)
        assert served == [tensor]
        with pytest.raises(ops.BackendError, match="sorts in the host's memory, got a tensor on mps"):
            dispatch.call("sorting", "sort_rows", tensor)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_an_operator_that_the_chosen_backend_does_not_have_is_served_as_by_auto(backend, monkeypatch):
    seen = modules_that_serve(monkeypatch)
    with ops.use_backend(backend):
        ops.mean_tokens(torch.ones(1, 2, 3, 4))
    assert seen == [("cpu", "token_mean")]


def test_the_reference_when_chosen_serves_what_is_else_left_to_pytorch(monkeypatch):
    seen = modules_that_serve(monkeypatch)
    qkv, x, weight = torch.ones(3, 1, 2, 3, 4), torch.ones(2, 4), torch.ones(4)
    ops.attend(qkv)
    ops.add_layer_norm(x, x, weight, weight)
    assert seen == []
    with ops.use_backend("reference"):
        ops.attend(qkv)
        ops.add_layer_norm(x, x, weight, weight)
    assert seen == [("reference", "attention"), ("reference", "residual_norm")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the core is not emulated beside a GPU")
def test_a_chosen_backend_is_asked_once_for_each_direction_of_a_call(emulated_core, monkeypatch):
    cuda, asked = backends.package("cuda"), []
    monkeypatch.setattr(cuda, "reason_against", asked.append)
    x, weight = torch.ones(2, 8, requires_grad=True), torch.ones(8)
    with core.use(emulated_core), ops.use_backend("cuda"):
        _, normed = ops.add_layer_norm(x, x, weight, weight)
        assert len(asked) == 1
        normed.sum().backward()
    assert len(asked) == 2


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_explicit_backend_that_cannot_serve_raises_and_says_why(backend, monkeypatch):
    monkeypatch.setattr(triton, "INTERPRETING", False)
    with ops.use_backend(backend), pytest.raises(ops.BackendError, match=f"backend {backend} cannot serve activation"):
        call()
    assert ops.current_backend() == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are neither emulated nor interpreted beside a GPU")
def test_auto_falls_back_from_a_call_that_the_first_backend_refuses_and_logs_it_once(as_on_a_gpu, caplog):
    first, second = (ops.select_tokens(*BEYOND_SHARED_MEMORY) for _ in range(2))
    assert torch.equal(first, second)
    assert first.sum() == 2  # every modality keeps its first token
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(
        "backend cuda is not used: backend cuda cannot select among tokens of shape (1, 2, 3, 8192)"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are neither emulated nor interpreted beside a GPU")
def test_auto_falls_back_in_the_backward_as_in_the_forward(as_on_a_gpu, rounding_interpreter):
    x, branch = torch.randn(2, 5128, requires_grad=True), torch.randn(2, 5128)
    weight, bias = torch.ones(5128), torch.zeros(5128)
    ops.add_layer_norm(x, branch, weight, bias)[1].square().sum().backward()
    plain = x.detach().clone().requires_grad_()
    F.layer_norm(plain + branch, weight.shape, weight, bias).square().sum().backward()
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are neither emulated nor interpreted beside a GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_dtype_without_kernels_is_refused_wherever_it_is(as_on_a_gpu, backend):
    x, weight = torch.randn(2, 8), torch.ones(8)
    with (
        ops.use_backend(backend),
        pytest.raises(ops.BackendError, match=f"backend {backend} cannot normalise in float64"),
    ):
        ops.add_layer_norm(x, None, weight, weight, out_dtype=torch.float64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are neither emulated nor interpreted beside a GPU")
def test_auto_falls_back_from_a_dtype_without_kernels(as_on_a_gpu):
    assert ops.quick_gelu(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.skipif(torch.cuda.is_available(), reason="the core is not emulated beside a GPU")
@pytest.mark.parametrize(("call_beyond", "message"), BEYOND_CUDA.values(), ids=BEYOND_CUDA)
def test_an_explicit_backend_refuses_what_it_has_no_room_for(emulated_core, call_beyond, message):
    with core.use(emulated_core), ops.use_backend("cuda"), pytest.raises(ops.BackendError, match=message):
        call_beyond()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the core is not emulated beside a GPU")
def test_an_error_of_the_cuda_runtime_is_no_refusal_and_makes_nothing_fall_back(as_on_a_gpu, monkeypatch, caplog):
    monkeypatch.setattr(token_selection, "_check", lambda tokens: None)  # the launcher's own guard is left
    with pytest.raises(RuntimeError, match=r"^select_tokens: invalid argument$") as caught:
        ops.select_tokens(*BEYOND_SHARED_MEMORY)
    assert not isinstance(caught.value, ops.BackendError)
    assert not caplog.records


def test_environment_chooses_and_the_block_overrides(monkeypatch):
    monkeypatch.setenv("SIGNAL_REID_BACKEND", "cuda")
    with pytest.raises(ops.BackendError):
        call()
    with ops.use_backend("reference"):
        call()


def test_a_choice_holds_from_the_call_on_and_with_ends_it():
    choice = ops.use_backend("reference")
    assert ops.current_backend() == "reference"
    with ops.use_backend("cpu"):
        assert ops.current_backend() == "cpu"
    assert ops.current_backend() == "reference"
    with choice:  # what was in force before the call
        assert ops.current_backend() == "reference"
    assert ops.current_backend() == "auto"


def test_a_choice_above_a_function_holds_within_it_alone():
    served = ops.use_backend("reference")(ops.current_backend)
    assert (ops.current_backend(), served(), ops.current_backend()) == ("auto", "reference", "auto")


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cpu, cuda, triton, got 'gpu'"):
        ops.use_backend("gpu")  # before any `with`
    monkeypatch.setenv("SIGNAL_REID_BACKEND", "gpu")
    with pytest.raises(ValueError, match="SIGNAL_REID_BACKEND must be one of"):
        call()


def test_triton_that_is_missing_or_too_old_is_named(monkeypatch):
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    assert "the package triton is not installed" in triton._reason_against_package.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setattr("triton.__version__", "2.3.1")
    assert "the package triton is 2.3.1, the kernels need" in triton._reason_against_package.__wrapped__()


@pytest.mark.parametrize(
    ("of_triton", "below", "too_new", "old_enough"),
    [("3.1.0", "2.0", "2.0.0", "1.26.4"), ("3.6.0", "2.4", "2.4.0", "2.3.5")],
)
def test_an_old_interpreter_with_a_new_numpy_is_named(monkeypatch, of_triton, below, too_new, old_enough):
    monkeypatch.setattr(triton, "INTERPRETING", True)
    monkeypatch.setattr("triton.__version__", of_triton)
    monkeypatch.setattr("numpy.__version__", too_new)
    assert triton._reason_against_package.__wrapped__() == (
        f"triton {of_triton} cannot interpret with numpy {too_new}; it needs numpy below {below}"
    )
    monkeypatch.setattr("numpy.__version__", old_enough)
    assert triton._reason_against_package.__wrapped__() is None


@pytest.mark.parametrize("numpy", ["2.4.6", "10.0.0"])
def test_a_new_interpreter_takes_any_numpy(monkeypatch, numpy):
    monkeypatch.setattr(triton, "INTERPRETING", True)
    monkeypatch.setattr("triton.__version__", "3.10.0")
    monkeypatch.setattr("numpy.__version__", numpy)
    assert triton._reason_against_package.__wrapped__() is None


def test_triton_without_a_c_compiler_or_python_s_headers_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(triton.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "there is no Python.h here" in triton._reason_against_compiling()
    monkeypatch.delenv("CC")
    monkeypatch.setattr(triton.shutil, "which", lambda name: None)
    assert "there is no cc, gcc or clang here" in triton._reason_against_compiling()


def test_triton_is_not_imported_before_it_is_asked_for():
    program = "import sys, signal_reid; signal_reid.ops.quick_gelu; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)

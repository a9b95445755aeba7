"""An explicit backend serves or raises; auto falls back."""

import pytest
import torch

from signal_reid import ops
from signal_reid.ops import triton


def call():
    return ops.quick_gelu(torch.ones(2))


def test_auto_serves_the_cpu_from_the_reference():
    assert ops.current_backend() == "auto"
    assert call().shape == (2,)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_explicit_backend_that_cannot_serve_raises_and_says_why(backend, monkeypatch):
    monkeypatch.setattr(triton, "INTERPRETING", False)
    with ops.use_backend(backend), pytest.raises(ops.BackendError, match=f"backend {backend} cannot serve quick_gelu"):
        call()
    assert ops.current_backend() == "auto"


def test_environment_chooses_and_the_block_overrides(monkeypatch):
    monkeypatch.setenv("SIGNAL_REID_BACKEND", "cuda")
    with pytest.raises(ops.BackendError):
        call()
    with ops.use_backend("reference"):
        call()


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cuda, triton, got 'gpu'"):
        ops.use_backend("gpu").__enter__()
    monkeypatch.setenv("SIGNAL_REID_BACKEND", "gpu")
    with pytest.raises(ValueError, match="SIGNAL_REID_BACKEND must be one of"):
        call()

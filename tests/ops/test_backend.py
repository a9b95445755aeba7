"""Every backend keeps the contract, and every device that PyTorch has finds the operators."""

import inspect
import pkgutil

import pytest
import torch

from signal_reid.ops import dispatch, reference
from signal_reid.ops.backend import BACKENDS, OPERATORS, package, serves

CASES = [(name, operator) for name in BACKENDS for operator in OPERATORS if serves(name, operator)]


def test_the_reference_serves_every_operator_and_nothing_else():
    assert {info.name for info in pkgutil.iter_modules(reference.__path__)} == set(OPERATORS)


@pytest.mark.parametrize(("name", "operator"), CASES)
def test_a_module_has_the_functions_and_arguments_of_the_reference(name, operator):
    for function in OPERATORS[operator]:
        ours, wanted = (getattr(dispatch.module(which, operator), function) for which in (name, "reference"))
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(wanted).parameters)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_says_whether_it_can_serve_here_and_a_tensor(name):
    reason = package(name).unavailable_reason()
    assert reason is None or len(reason) > 10
    assert name in ("cuda", "triton") or reason is None
    assert package(name).reason_against(torch.ones(1)) is None or name in ("cuda", "triton")
    assert dispatch.unavailable_reason(name) == reason


OURS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("signal_reid::"))


@pytest.mark.parametrize("name", OURS)
def test_operators_are_registered_for_every_device(name):
    for device in ("CPU", "CUDA", "MPS", "XPU", "HPU", "PrivateUse1"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, device)


def test_there_are_operators():
    assert len(OURS) >= 18

"""Every backend keeps the contract, and every device that PyTorch has finds the operators."""

import ast
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch

from signal_reid.ops import dispatch, reference, triton
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


@pytest.mark.parametrize("source", sorted(Path(triton.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_no_kernel_of_triton_has_a_constant_before_the_operator(source):
    """The interpreters of Triton 3.7 and 3.8 make a constant of `CONSTANT * tensor`, and fail where it is used."""
    tree = ast.parse(source.read_text())
    constants = {
        node.targets[0].id
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("tl.constexpr(")
    }
    first = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and ast.unparse(node.left) in constants
    ]
    assert first == []

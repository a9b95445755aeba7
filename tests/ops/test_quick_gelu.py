"""QuickGELU equals its formula and differentiates it."""

import pytest
import torch
from torch.autograd import gradcheck

from signal_reid.ops import quick_gelu


def formula(x):
    return x * torch.sigmoid(1.702 * x)


def test_equals_its_formula():
    x = torch.linspace(-20, 20, 1001, dtype=torch.float64)
    assert torch.allclose(quick_gelu(x), formula(x), rtol=1e-12, atol=1e-15)


def test_gradcheck():
    assert gradcheck(quick_gelu, torch.randn(3, 5, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_is_at_most_twice_that_of_the_formula_in_the_same_dtype(dtype):
    x = torch.randn(10_000).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    plain = x.detach().clone().requires_grad_()
    exact, ours, theirs = formula(wide), quick_gelu(x), formula(plain)
    assert (ours.double() - exact).abs().max() <= 2 * (theirs.double() - exact).abs().max()
    for value in (exact, ours, theirs):
        value.sum().backward()
    error, allowed = (x.grad.double() - wide.grad).abs().max(), (plain.grad.double() - wide.grad).abs().max()
    assert error <= 2 * allowed


def test_input_is_left_alone_and_empty_is_allowed():
    x = torch.randn(4, 3)[:, ::2]
    before = x.clone()
    quick_gelu(x)
    assert torch.equal(x, before)
    assert quick_gelu(torch.empty(0, 3)).shape == (0, 3)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="x must be float32"):
        quick_gelu(torch.arange(3))

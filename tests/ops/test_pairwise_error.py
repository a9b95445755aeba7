"""The mean over pairs of maps of their mean squared difference is that of PyTorch's own loss."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.autograd import gradcheck

from signal_reid import ops

OPERATOR = "pairwise_error"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def formula(maps):
    return torch.stack([F.mse_loss(a, b) for a, b in combinations(maps.unbind(), 2)]).mean()


def both_ways(loss, maps):
    leaf = maps.detach().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf, torch.full_like(value, 3.0))[0]


def assert_equals_formula(maps):
    (loss, grad), (wanted, wanted_grad) = both_ways(ops.pairwise_mse_loss, maps), both_ways(formula, maps.double())
    assert (loss.dtype, grad.dtype, grad.shape) == (torch.float32, maps.dtype, maps.shape)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0.0)
    rounding = max(1e-5, torch.finfo(maps.dtype).eps)
    assert (grad.double() - wanted_grad).abs().max() <= rounding * wanted_grad.abs().max()


def test_equals_the_formula_at_any_size(backend):
    backend.for_all(
        lambda M, size, dtype: assert_equals_formula(torch.randn(M, size).to(dtype)),
        M=st.integers(2, 6),
        size=st.sampled_from([1, 5, 8, 2048, 5001]),
        dtype=st.sampled_from(DTYPES),
    )


def test_more_numbers_than_there_are_shares(backend, monkeypatch):
    if backend.name != "reference":
        monkeypatch.setattr(ops.dispatch.module(backend.name, OPERATOR), "MOST_SHARES", 2)
    assert_equals_formula(torch.randn(3, 9001))


def test_maps_that_are_nearly_alike_keep_their_digits(backend):
    assert_equals_formula(100 + torch.randint(-8, 8, (3, 2, 70)) * 2.0**-12)  # exact in fp32


def test_any_strides_and_dimensions(backend):
    for maps in (torch.randn(5, 2, 4, 3).transpose(0, 1), torch.randn(3, 4, 16)[..., ::2], torch.randn(3, 17)[:, 1:]):
        assert_equals_formula(maps)


def test_what_is_not_a_number_shows(backend):
    maps = torch.randn(3, 20)
    maps[1, 7] = torch.nan
    loss, grad = both_ways(ops.pairwise_mse_loss, maps)
    assert loss.isnan()
    assert grad.isnan().nonzero().tolist() == [[0, 7], [1, 7], [2, 7]]


def test_maps_without_numbers(backend):
    loss, grad = both_ways(ops.pairwise_mse_loss, torch.randn(3, 0, 4))
    assert loss.isnan()
    assert grad.shape == (3, 0, 4)


@pytest.mark.parametrize("choice", ["reference", "auto"])
def test_gradcheck(choice):
    with ops.use_backend(choice):
        assert gradcheck(ops.pairwise_mse_loss, torch.randn(3, 7, dtype=torch.float64, requires_grad=True))


def test_second_derivative_is_refused(backend):
    maps = torch.randn(3, 7, requires_grad=True)
    with pytest.raises(RuntimeError, match="pairwise_mse_loss is not differentiable twice"):
        torch.autograd.grad(ops.pairwise_mse_loss(maps), maps, create_graph=True)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (torch.randn(1, 4), r"maps must hold at least 2 maps \(M, ...\), got shape \(1, 4\)"),
        (torch.randn(()), r"got shape \(\)"),
        (torch.ones(2, 4, dtype=torch.int64), "maps must be float32, .*, got torch.int64"),
    ],
)
def test_bad_input_is_named(maps, message):
    with pytest.raises(ValueError, match=message):
        ops.pairwise_mse_loss(maps)

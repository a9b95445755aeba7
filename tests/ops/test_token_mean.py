"""The mean over tokens is taken in fp32 or wider, and its gradient spreads evenly."""

import pytest
import torch
from hypothesis import strategies as st
from torch.autograd import gradcheck

from signal_reid import ops
from signal_reid.ops.reference import token_mean as oracle

OPERATOR = "token_mean"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def formula(tokens):
    """A sum of widened tokens over their number."""
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return wide.sum(2) / tokens.shape[2]


def test_is_as_close_as_plain_pytorch_at_any_size(backend, assert_as_close_as_plain):
    def check(B, M, N, C, dtype):
        tokens = torch.randn(B, M, N + 1, C).to(dtype)[:, :, 1:]
        assert_as_close_as_plain(ops.mean_tokens, formula, [tokens], torch.randn(B, M, C))

    backend.for_all(
        check,
        B=st.integers(0, 2),
        M=st.integers(1, 4),
        N=st.sampled_from([1, 5, 127, 129]),
        C=st.sampled_from([0, 1, 8, 33]),
        dtype=st.sampled_from(DTYPES),
    )


def test_in_fp64_the_oracle_is_its_formula():
    tokens = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    assert torch.allclose(oracle.forward(tokens), formula(tokens), rtol=1e-12)


def test_gradcheck(backend):
    assert gradcheck(ops.mean_tokens, torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True))


def test_the_gradient_of_tokens_in_low_precision_is_rounded_once_and_spread_as_a_view(backend):
    tokens, grad = torch.randn(2, 3, 7, 5).bfloat16().requires_grad_(), torch.randn(2, 3, 5)
    (got,) = torch.autograd.grad(ops.mean_tokens(tokens), tokens, grad)
    assert torch.equal(got, (grad / 7).bfloat16()[:, :, None].expand(tokens.shape))
    assert got.stride(2) == 0


def test_what_is_not_a_number_stays_in_its_channel(backend):
    tokens = torch.randn(2, 3, 7, 5)
    tokens[1, 2, 3, 4] = torch.nan
    mean = ops.mean_tokens(tokens)
    assert mean.isnan().nonzero().tolist() == [[1, 2, 4]]


def test_no_tokens_have_no_mean(backend):
    tokens = torch.empty(2, 3, 0, 5, requires_grad=True)
    mean = ops.mean_tokens(tokens)
    assert mean.isnan().all()
    assert torch.autograd.grad(mean.sum(), tokens)[0].shape == tokens.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_does_not_narrow_it(backend, dtype):
    tokens = torch.randn(2, 3, 7, 5).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ops.mean_tokens(tokens)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, ops.mean_tokens(tokens))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"tokens must be \(B, M, N, C\), got shape \(2, 3, 4\)"):
        ops.mean_tokens(torch.randn(2, 3, 4))

"""The attention of class tokens over masked tokens, written without projecting a token."""

import pytest
import torch

from signal_reid.methods.signal.selective_interaction import MaskedAttention
from signal_reid.ops import select_tokens


def plain(queries, tokens, mask):
    x = (tokens * mask[..., None]).flatten(1, 2)  # (B, M * N, C)
    return (queries @ x.transpose(1, 2)).softmax(-1) @ x


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    tokens = torch.randn(2, 3, 1 + 6, 5, dtype=torch.float64)[:, :, 1:].detach().requires_grad_()
    return torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True), tokens, torch.rand(2, 3, 6) < 0.6


def test_equals_attention_over_tokens_times_mask(inputs):
    torch.testing.assert_close(MaskedAttention.apply(*inputs), plain(*inputs))


def test_gradients_are_those_of_the_formula(inputs):
    queries, tokens, mask = inputs
    assert torch.autograd.gradcheck(lambda u, x: MaskedAttention.apply(u, x, mask), (queries, tokens))


def test_a_masked_token_gets_no_gradient(inputs):
    queries, tokens, mask = inputs
    MaskedAttention.apply(queries, tokens, mask).square().sum().backward()
    assert (tokens.grad[~mask] == 0).all()
    assert (tokens.grad[mask] != 0).any(-1).all()


def test_low_precision_queries_lead_and_each_gradient_has_its_input_s_dtype(inputs):
    queries, tokens, mask = inputs
    queries, tokens = (x.detach().to(d).requires_grad_() for x, d in ((queries, torch.bfloat16), (tokens, torch.float)))
    z = MaskedAttention.apply(queries, tokens, mask)
    z.sum().backward()
    assert (z.dtype, queries.grad.dtype, tokens.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_autocast_does_not_round_the_scores_that_choose_tokens():
    torch.manual_seed(0)
    tokens, cls = torch.randn(64, 3, 128, 64).bfloat16(), torch.randn(64, 3, 64).bfloat16()
    inter_query = torch.zeros_like(cls)
    with torch.autocast("cpu", torch.bfloat16):
        mask = select_tokens(tokens, cls, inter_query, 40, 1)
    assert torch.equal(mask, select_tokens(tokens, cls, inter_query, 40, 1))

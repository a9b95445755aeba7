"""Tokens are split by modality, laid out as the device multiplies them fastest."""

import pytest
import torch

from signal_reid import ops

OPERATOR = "token_maps"


@pytest.mark.parametrize("shape", [(2, 3, 6, 5), (0, 3, 6, 5), (2, 1, 1, 1), (2, 0, 6, 5)])
def test_maps_are_the_tokens_of_each_modality_with_their_gradient(backend, shape):
    B, M, N, C = shape
    tokens = torch.randn(B, M, N + 1, C)[:, :, 1:].detach().requires_grad_()
    maps = ops.split_modalities(tokens)
    assert len(maps) == M
    for m, x in enumerate(maps):
        assert torch.equal(x, tokens[:, m])
    if M:
        grad = torch.randn(shape)
        assert torch.equal(torch.autograd.grad(torch.stack(maps, 1), tokens, grad)[0], grad)


def test_on_a_cpu_they_are_contiguous_else_views(backend):
    tokens = torch.randn(2, 3, 7, 5)[:, :, 1:]
    maps = ops.split_modalities(tokens)
    shared = [x.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr() for x in maps]
    assert all(x.is_contiguous() for x in maps) == (backend.name == "cpu")
    assert all(shared) == (backend.name == "reference")


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"tokens must be \(B, M, N, C\), got shape \(2, 3, 4\)"):
        ops.split_modalities(torch.randn(2, 3, 4))

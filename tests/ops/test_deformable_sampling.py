"""Sampling equals grid_sample at the moved reference points, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from signal_reid.ops import deformable_sample


def by_grid_sample(tokens, offsets, grid_size, offset_range=2.0):
    (H, W), (Hk, Wk) = grid_size, offsets.shape[1:]
    y, x = (2 * (torch.arange(n, dtype=tokens.dtype) + 0.5) / (n - 1) - 1 for n in (Hk, Wk))
    shift = offsets.tanh() * offset_range
    grid = torch.stack([x + shift / (Wk - 1), y[:, None] + shift / (Hk - 1)], dim=-1).clamp(-1, 1)
    maps = tokens.transpose(1, 2).unflatten(2, (H, W))
    return F.grid_sample(maps, grid, align_corners=True).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("grid_size", [(16, 8), (8, 16), (9, 13), (1, 5), (2, 2)])
@pytest.mark.parametrize("sampled", [(4, 2), (2, 2), (3, 5)])
def test_equals_grid_sample_with_gradients(grid_size, sampled):
    inputs = [
        torch.randn(3, grid_size[0] * grid_size[1], 6, dtype=torch.float64, requires_grad=True),
        (2 * torch.randn(3, *sampled, dtype=torch.float64)).requires_grad_(),
    ]
    ours, theirs = deformable_sample(*inputs, grid_size), by_grid_sample(*inputs, grid_size)
    assert torch.allclose(ours, theirs, rtol=1e-9)
    weight = torch.randn_like(ours)
    ours_gradients = torch.autograd.grad((ours * weight).sum(), inputs)
    for got, expected in zip(ours_gradients, torch.autograd.grad((theirs * weight).sum(), inputs), strict=True):
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_gradcheck():
    tokens = torch.randn(2, 40, 3, dtype=torch.float64, requires_grad=True)
    offsets = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t, o: deformable_sample(t, o, (8, 5)), (tokens, offsets))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_only_rounding(dtype):
    tokens, offsets = torch.randn(2, 128, 16).to(dtype), torch.randn(2, 4, 2).to(dtype)
    exact = deformable_sample(tokens.double(), offsets.double(), (16, 8))
    got = deformable_sample(tokens, offsets, (16, 8))
    assert got.dtype == dtype
    assert (got.double() - exact).abs().max() <= 2 * (exact.to(dtype).double() - exact).abs().max()


def test_offsets_that_are_not_numbers_give_nan_not_a_crash():
    offsets = torch.zeros(1, 2, 2)
    offsets[0, 0, 0] = float("nan")
    offsets[0, 0, 1] = float("inf")
    sampled = deformable_sample(torch.randn(1, 64, 4), offsets, (8, 8))
    assert sampled[0, 0].isnan().all()
    assert sampled[0, 1:].isfinite().all()


def test_strided_and_empty_tokens():
    sequence, offsets = torch.randn(2, 65, 4), torch.randn(2, 2, 2)
    strided = deformable_sample(sequence[:, 1:], offsets, (8, 8))
    assert torch.equal(strided, deformable_sample(sequence[:, 1:].contiguous(), offsets, (8, 8)))
    assert deformable_sample(sequence[:0, 1:], offsets[:0], (8, 8)).shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid_size": (8, 7)}, r"grid_size must multiply to the number of tokens \(64\), got \(8, 7\)"),
        ({"offsets": torch.randn(2, 1, 2)}, r"offsets must be at least 2 x 2"),
        ({"offsets": torch.randn(3, 2, 2)}, "offsets must have shape"),
        ({"offset_range": 0.0}, "offset_range must be positive and finite, got 0.0"),
        ({"tokens": torch.randn(2, 8, 8, 4)}, r"tokens must be \(B, H \* W, C\)"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"tokens": torch.randn(2, 64, 4), "offsets": torch.randn(2, 2, 2), "grid_size": (8, 8)} | change
    with pytest.raises(ValueError, match=message):
        deformable_sample(**arguments)

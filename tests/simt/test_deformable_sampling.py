"""The CUDA kernels of deformable sampling equal the oracle, as close as plain PyTorch comes in the same dtype."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from signal_reid.ops.cuda import deformable_sampling as cuda
from signal_reid.ops.reference import deformable_sampling as reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GRIDS = [(16, 8), (8, 16), (9, 13), (1, 5), (5, 1), (1, 1), (2, 2)]
SAMPLED = [(4, 2), (2, 2), (3, 5), (7, 6)]


def inputs(B, grid, sampled, C, dtype, seed=0):
    """Tokens as a slice behind a class token, offsets, and a gradient of the samples."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(B, grid[0] * grid[1] + 1, C, generator=generator)[:, 1:]
    offsets = 1.5 * torch.randn(B, *sampled, generator=generator)
    grad = torch.randn(B, sampled[0] * sampled[1], C, generator=generator)
    return [tensor.to(dtype) for tensor in (tokens, offsets, grad)]


def both_ways(backend, tokens, offsets, grad, grid, offset_range=2.0):
    sampled = backend.forward(tokens, offsets, *grid, offset_range)
    return sampled, *backend.backward(grad, tokens, offsets, *grid, offset_range)


def assert_equals_oracle(tokens, offsets, grad, grid, offset_range=2.0):
    got = both_ways(cuda, tokens, offsets, grad, grid, offset_range)
    plain = both_ways(reference, tokens, offsets, grad, grid, offset_range)
    exact = both_ways(reference, *(x.double() for x in (tokens, offsets, grad)), grid, offset_range)
    for result, of_plain, wanted in zip(got, plain, exact, strict=True):
        assert result.dtype == tokens.dtype
        assert result.shape == wanted.shape
        if not wanted.numel():
            continue
        error, of_plain = ((x.double() - wanted).abs().max() for x in (result, of_plain))
        if tokens.dtype == torch.float32:
            assert error <= 1e-4 * wanted.abs().max()
        else:
            assert error <= 2 * of_plain


def test_equals_the_oracle_at_any_size(on_emulator, examples):
    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        B=st.integers(0, 3),
        grid=st.sampled_from(GRIDS),
        sampled=st.sampled_from(SAMPLED),
        C=st.sampled_from([0, 1, 5, 8, 127, 128, 129, 520]),
        dtype=st.sampled_from(DTYPES),
        offset_range=st.sampled_from([0.5, 2.0, 30.0]),
        seed=st.integers(0, 99),
    )
    def check(B, grid, sampled, C, dtype, offset_range, seed):
        on_emulator(seed + 1)
        assert_equals_oracle(*inputs(B, grid, sampled, C, dtype, seed), grid, offset_range)

    check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_shape_of_the_published_model(on_emulator, dtype):
    assert_equals_oracle(*inputs(2, (16, 8), (4, 2), 512, dtype), (16, 8))


def test_more_points_than_shared_memory_holds(on_emulator):
    assert_equals_oracle(*inputs(1, (5, 7), (18, 17), 8, torch.float32), (5, 7))


@pytest.mark.parametrize("C", [1100, 1101])
def test_more_channels_than_one_pass(on_emulator, C):
    assert_equals_oracle(*inputs(1, (3, 4), (2, 2), C, torch.float32), (3, 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_of_the_inputs(on_emulator, dtype):
    tokens, offsets, grad = inputs(2, (4, 5), (3, 2), 16, dtype)
    wide = torch.randn(2, 21, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    for view in (wide[:, 1:, :16], wide[:, 1:, 3:19], wide[:1, 1:, ::3].expand(2, -1, -1)):
        assert_equals_oracle(view, offsets, grad, (4, 5))
    turned = offsets.transpose(1, 2).contiguous().transpose(1, 2)
    assert_equals_oracle(tokens, turned, grad.transpose(1, 2).contiguous().transpose(1, 2), (4, 5))
    assert_equals_oracle(tokens, offsets, torch.ones((), dtype=dtype).expand(2, 6, 16), (4, 5))


def test_positions_on_the_edge_are_clamped_with_gradient_zero(on_emulator):
    tokens, _, grad = inputs(1, (6, 6), (2, 2), 8, torch.float32)
    offsets = torch.tensor([[[-20.0, 0.0], [0.0, 20.0]]])  # the last row and column lie beyond the map anyway
    sampled, _, grad_offsets = both_ways(cuda, tokens, offsets, grad, (6, 6), 3.0)
    assert torch.equal(sampled[0, [0, 3]], tokens[0, [0, 35]])
    assert grad_offsets[0, 0, 0] == 0
    assert grad_offsets[0, 1, 1] == 0


def test_tokens_that_no_point_touches_get_gradient_zero(on_emulator):
    tokens, _, grad = inputs(1, (9, 9), (2, 2), 8, torch.float32)
    offsets = torch.full((1, 2, 2), 20.0)
    grad_tokens = both_ways(cuda, tokens, offsets, grad, (9, 9))[1]  # every point reads the last token
    assert torch.equal(grad_tokens[0, :80], torch.zeros(80, 8))
    assert torch.allclose(grad_tokens[0, 80], grad[0].sum(0))


def test_offsets_that_are_not_numbers_give_nan_not_a_bad_index(on_emulator):
    tokens, _, grad = inputs(1, (8, 8), (2, 2), 4, torch.float32)
    offsets = torch.tensor([[[float("nan"), float("inf")], [-float("inf"), 0.0]]])
    got = both_ways(cuda, tokens, offsets, grad, (8, 8))
    for result, expected in zip(got, both_ways(reference, tokens, offsets, grad, (8, 8)), strict=True):
        assert torch.allclose(result, expected, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert got[0][0, 0].isnan().all()
    assert got[0][0, 1:].isfinite().all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_tokens_that_are_not_numbers_stay_where_they_are_read(on_emulator, poison):
    tokens, offsets, grad = inputs(2, (4, 4), (3, 3), 8, torch.float32)
    tokens[0, 5, 2] = poison
    got = both_ways(cuda, tokens, offsets, grad, (4, 4))
    for result, expected in zip(got, both_ways(reference, tokens, offsets, grad, (4, 4)), strict=True):
        assert torch.equal(result.isfinite(), expected.isfinite())
    assert not got[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_same_to_the_bit_whatever_the_schedule(on_emulator, dtype):
    arguments = inputs(2, (9, 13), (4, 5), 40, dtype)
    runs = []
    for seed in (1, 2, 3):
        on_emulator(seed)
        runs.append(both_ways(cuda, *arguments, (9, 13)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))

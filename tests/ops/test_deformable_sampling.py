"""Sampling equals grid_sample at the moved reference points, gradients included, as closely as plain PyTorch comes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch.autograd import gradcheck

from signal_reid import ops
from signal_reid.ops import deformable_sample
from signal_reid.ops.cpu import deformable_sampling as in_low_precision
from signal_reid.ops.reference import deformable_sampling as oracle

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GRIDS = [(16, 8), (8, 16), (9, 13), (1, 5), (5, 1), (1, 1), (2, 2)]
SAMPLED = [(4, 2), (2, 2), (3, 5), (7, 6)]


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


def inputs(B, grid, sampled, C, dtype):
    """Tokens as a slice behind a class token, offsets, and a gradient of the samples."""
    tokens = torch.randn(B, grid[0] * grid[1] + 1, C)[:, 1:]
    offsets = 1.5 * torch.randn(B, *sampled)
    return [tensor.to(dtype) for tensor in (tokens, offsets, torch.randn(B, sampled[0] * sampled[1], C))]


def both_ways(tokens, offsets, grad, grid, offset_range=2.0):
    """Samples and both gradients by the backend in force."""
    leaves = [tensor.detach().requires_grad_() for tensor in (tokens, offsets)]
    sampled = deformable_sample(*leaves, grid, offset_range)
    return sampled.detach(), *torch.autograd.grad(sampled, leaves, grad)


def plain(tokens, offsets, grad, grid, offset_range=2.0):
    """The same by plain PyTorch, which sums in the dtype that it is given."""
    arguments = tokens, offsets, *grid, offset_range
    served = oracle if tokens.dtype == torch.float64 else in_low_precision
    return served.forward(*arguments), *served.backward(grad, *arguments)


def assert_equals_oracle(tokens, offsets, grad, grid, offset_range=2.0):
    got = both_ways(tokens, offsets, grad, grid, offset_range)
    of_plain = plain(tokens, offsets, grad, grid, offset_range)
    exact = plain(*(x.double() for x in (tokens, offsets, grad)), grid, offset_range)
    for result, same_precision, wanted in zip(got, of_plain, exact, strict=True):
        assert result.dtype == tokens.dtype
        assert result.shape == wanted.shape
        if not wanted.numel():
            continue
        error, allowed = ((x.double() - wanted).abs().max() for x in (result, same_precision))
        assert error <= (1e-4 * wanted.abs().max() if tokens.dtype == torch.float32 else 2 * allowed)


def test_equals_the_oracle_at_any_size(backend):
    def check(B, grid, sampled, C, dtype, offset_range):
        assume(backend.name != "triton" or B * C < 600)  # the interpreter is slow
        assert_equals_oracle(*inputs(B, grid, sampled, C, dtype), grid, offset_range)

    backend.for_all(
        check,
        B=st.integers(0, 3),
        grid=st.sampled_from(GRIDS),
        sampled=st.sampled_from(SAMPLED),
        C=st.sampled_from([0, 1, 5, 8, 127, 128, 129, 520]),
        dtype=st.sampled_from(DTYPES),
        offset_range=st.sampled_from([0.5, 2.0, 30.0]),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_shape_of_the_published_model(backend, dtype):
    assert_equals_oracle(*inputs(1, (16, 8), (4, 2), 512, dtype), (16, 8))


def test_more_points_than_are_located_at_a_time(backend):
    assert_equals_oracle(*inputs(1, (5, 7), (18, 17), 8, torch.float32), (5, 7))


@pytest.mark.parametrize("C", [1100, 1101])
def test_more_channels_than_one_pass(backend, C):
    assert_equals_oracle(*inputs(1, (3, 4), (2, 2), C, torch.float32), (3, 4))


def strided(dtype):
    """Tokens, offsets and gradients with other strides than usual."""
    tokens, offsets, grad = inputs(2, (4, 5), (3, 2), 16, dtype)
    wide = torch.randn(2, 21, 48).to(dtype)
    for view in (wide[:, 1:, :16], wide[:, 1:, 3:19], wide[:1, 1:, ::3].expand(2, -1, -1)):
        yield view, offsets, grad
    turned = offsets.transpose(1, 2).contiguous().transpose(1, 2)
    yield tokens, turned, grad.transpose(1, 2).contiguous().transpose(1, 2)
    yield tokens, offsets, torch.ones((), dtype=dtype).expand(2, 6, 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_of_the_inputs(backend, dtype):
    for tokens, offsets, grad in strided(dtype):
        assert_equals_oracle(tokens, offsets, grad, (4, 5))


def test_strides_make_no_difference(backend):
    for tokens, offsets, _ in strided(torch.float32):
        assert torch.equal(
            deformable_sample(tokens, offsets, (4, 5)),
            deformable_sample(tokens.contiguous(), offsets.contiguous(), (4, 5)),
        )


def test_positions_on_the_edge_are_clamped_with_gradient_zero(backend):
    tokens, _, grad = inputs(1, (6, 6), (2, 2), 8, torch.float32)
    offsets = torch.tensor([[[-20.0, 0.0], [0.0, 20.0]]])  # the last row and column lie beyond the map anyway
    sampled, _, grad_offsets = both_ways(tokens, offsets, grad, (6, 6), 3.0)
    assert torch.equal(sampled[0, [0, 3]], tokens[0, [0, 35]])
    assert grad_offsets[0, 0, 0] == 0
    assert grad_offsets[0, 1, 1] == 0


def test_tokens_that_no_point_touches_get_gradient_zero(backend):
    tokens, _, grad = inputs(1, (9, 9), (2, 2), 8, torch.float32)
    offsets = torch.full((1, 2, 2), 20.0)
    grad_tokens = both_ways(tokens, offsets, grad, (9, 9))[1]  # every point reads the last token
    assert torch.equal(grad_tokens[0, :80], torch.zeros(80, 8))
    assert torch.allclose(grad_tokens[0, 80], grad[0].sum(0))


def test_offsets_that_are_not_numbers_give_nan_not_a_bad_index(backend):
    tokens, _, grad = inputs(1, (8, 8), (2, 2), 4, torch.float32)
    offsets = torch.tensor([[[float("nan"), float("inf")], [-float("inf"), 0.0]]])
    got = both_ways(tokens, offsets, grad, (8, 8))
    for result, expected in zip(got, plain(tokens, offsets, grad, (8, 8)), strict=True):
        assert torch.allclose(result, expected, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert got[0][0, 0].isnan().all()
    assert got[0][0, 1:].isfinite().all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("poisoned", ["tokens", "gradient"])
def test_what_is_not_a_number_stays_where_it_is_read(backend, poisoned, poison):
    tokens, offsets, grad = inputs(2, (4, 4), (3, 3), 8, torch.float32)
    (tokens if poisoned == "tokens" else grad)[0, 5, 2] = poison
    got = both_ways(tokens, offsets, grad, (4, 4))
    for result, expected in zip(got, plain(tokens, offsets, grad, (4, 4)), strict=True):
        assert torch.equal(result.isfinite(), expected.isfinite())
    assert not all(result.isfinite().all() for result in got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_same_to_the_bit_whatever_the_schedule(backend, dtype):
    arguments = inputs(2, (9, 13), (4, 5), 40, dtype)
    first, *again = [
        (backend.reseed(seed), *both_ways(*arguments, (9, 13)))[1:] for seed in range(2 + backend.emulated)
    ]
    for run in again:
        assert all(torch.equal(a, b) for a, b in zip(run, first, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU both are compared with the oracle")
def test_both_kinds_of_kernels_agree(emulated_core, rounding_interpreter):
    arguments = inputs(2, (9, 13), (4, 5), 40, torch.float32)
    with ops.use_backend("triton"):
        by_triton = both_ways(*arguments, (9, 13))
    with ops.cuda.core.use(emulated_core), ops.use_backend("cuda"):
        by_cuda = both_ways(*arguments, (9, 13))
    for a, b in zip(by_triton, by_cuda, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_no_maps(backend):
    tokens, offsets, _ = inputs(0, (8, 8), (2, 2), 4, torch.float32)
    assert deformable_sample(tokens, offsets, (8, 8)).shape == (0, 4, 4)


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

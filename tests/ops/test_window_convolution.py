"""A convolution of windows side by side is PyTorch's depthwise convolution of that stride, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch.autograd import gradcheck

from signal_reid import ops
from signal_reid.ops.reference import window_convolution as oracle

OPERATOR = "window_convolution"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def formula(x, window):
    """Window by window, products and sums in the dtype of x."""
    k = window.shape[-1]
    windows = x.unfold(1, k, k).unfold(2, k, k)  # (B, Hk, Wk, C, k, k)
    return (windows * window).sum((-2, -1))


def by_convolution(x, window):
    k = window.shape[-1]
    y = F.conv2d(x.permute(0, 3, 1, 2), window[:, None], stride=k, groups=len(window))
    return y.permute(0, 2, 3, 1)


def draw(B, H, W, C, k, dtype=torch.float64):
    """x behind a class token, window, and a gradient."""
    x = torch.randn(B, 1 + H * W, C).to(dtype)[:, 1:].unflatten(1, (H, W))
    return x, torch.randn(C, k, k).to(dtype), torch.randn(B, H // k, W // k, C).to(dtype)


def test_is_as_close_as_plain_pytorch_at_any_size(backend, assert_as_close_as_plain):
    def check(B, H, W, C, k, dtype):
        assume(min(H, W) >= k)
        x, window, grad = draw(B, H, W, C, k, dtype)
        assert_as_close_as_plain(ops.convolve_windows, formula, [x, window], grad)

    backend.for_all(
        check,
        B=st.integers(1, 3),
        H=st.sampled_from([1, 5, 8]),
        W=st.sampled_from([1, 7, 13]),
        C=st.sampled_from([1, 5, 127, 129]),
        k=st.integers(1, 5),
        dtype=st.sampled_from(DTYPES),
    )


@pytest.mark.parametrize("k", [1, 2, 4])
def test_in_fp64_the_oracle_is_pytorchs_convolution(k):
    x, window, grad = draw(2, 9, 10, 3, k)
    leaves = x.clone().requires_grad_(), window.clone().requires_grad_()
    expected = by_convolution(*leaves)
    assert torch.allclose(oracle.forward(x, window), expected, rtol=1e-12, atol=1e-14)
    derived = oracle.backward(grad, x, window)
    for got, wanted in zip(derived, torch.autograd.grad(expected, leaves, grad), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-13)


def test_gradcheck(backend):
    x, window, _ = draw(2, 5, 4, 3, 2)
    assert gradcheck(ops.convolve_windows, (x.detach().requires_grad_(), window.requires_grad_()))


@pytest.mark.parametrize(
    ("B", "H", "W", "C", "k"), [(0, 8, 8, 4, 4), (2, 3, 8, 4, 4), (2, 8, 8, 0, 4), (1, 0, 4, 2, 1)]
)
def test_nothing_to_convolve_gives_an_empty_map_and_gradients_of_zero(backend, B, H, W, C, k):
    x, window, grad = draw(B, H, W, C, k, torch.float32)
    leaves = x.detach().requires_grad_(), window.requires_grad_()
    y = ops.convolve_windows(*leaves)
    assert y.shape == (B, H // k, W // k, C)
    for leaf, gradient in zip(leaves, torch.autograd.grad(y, leaves, grad), strict=True):
        assert gradient.shape == leaf.shape
        assert (gradient == 0).all()


def test_any_strides_of_inputs_and_gradients(backend):
    x, window, grad = draw(2, 8, 9, 6, 4, torch.float32)
    turned = (
        x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        window.mT.contiguous().mT,
        torch.ones(()).expand(grad.shape),
    )

    def results(function, x, window, grad):
        leaves = x.detach().requires_grad_(), window.detach().requires_grad_()
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, grad)

    expected = results(formula, x, window, torch.ones_like(grad))
    for got, wanted in zip(results(ops.convolve_windows, *turned), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_what_is_not_a_number_stays_in_its_window_and_beyond_the_last_is_not_read(backend):
    x, window, grad = draw(1, 9, 8, 3, 4, torch.float32)
    x[0, 2, 5, 1] = torch.nan
    x[0, 8] = torch.nan
    leaves = x.detach().requires_grad_(), window.requires_grad_()
    y = ops.convolve_windows(*leaves)
    assert y.isnan().nonzero().tolist() == [[0, 0, 1, 1]]
    of_x, of_window = torch.autograd.grad(y, leaves, grad)
    assert of_x.isfinite().all()
    assert (of_x[0, 8] == 0).all()
    assert of_window.isnan().nonzero().tolist() == [[1, 2, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_makes_it_convolve_in_its_precision(backend, dtype):
    x, window, grad = draw(2, 8, 8, 6, 4, torch.float32)
    leaves = x.detach().requires_grad_(), window.requires_grad_()
    with torch.autocast("cpu", dtype):
        inside = ops.convolve_windows(*leaves)
    outside = ops.convolve_windows(*(leaf.to(dtype) for leaf in leaves))
    assert inside.dtype == dtype
    assert torch.equal(inside, outside)
    gradients = (torch.autograd.grad(y, leaves, grad.to(dtype)) for y in (inside, outside))
    for got, wanted in zip(*gradients, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 8, 4)}, r"x must be \(B, H, W, C\), got shape"),
        ({"window": torch.randn(4, 2, 3)}, r"window must have shape \(4, 3, 3\)"),
        ({"window": torch.randn(5, 2, 2)}, r"window must have shape \(4, 2, 2\) to go with x"),
        ({"window": torch.randn(4, 0, 0)}, "k at least 1"),
        ({"window": torch.randn(4, 2, 2).half()}, "window must have the dtype of x"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ops.convolve_windows(**{"x": torch.randn(2, 8, 8, 4), "window": torch.randn(4, 2, 2)} | change)

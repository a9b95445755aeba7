"""QuickGELU equals its formula and differentiates it, on every backend."""

import pytest
import torch
from hypothesis import strategies as st
from torch.autograd import gradcheck

from signal_reid.ops import quick_gelu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def formula(x):
    return x * torch.sigmoid(1.702 * x)


def with_gradient(function, x, grad):
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return y.detach(), *torch.autograd.grad(y, leaf, grad)


def plain_errors(x, grad):
    """Largest error of plain PyTorch in the dtype of x: of the result, of the gradient."""
    plain, exact = with_gradient(formula, x, grad), with_gradient(formula, x.double(), grad.double())
    return [(a.double() - b).abs().max() for a, b in zip(plain, exact, strict=True)]


def assert_close(x, grad):
    """In fp32 1e-4 of the largest magnitude, else at most twice the error of plain PyTorch in the same dtype.

    Its error is taken over a thousand more numbers, as on a single one it may be nothing by chance.
    """
    exact = with_gradient(formula, x.double(), grad.double())
    errors_of_plain = plain_errors(*(torch.cat([y.flatten(), torch.randn(1000).to(y)]) for y in (x, grad)))
    for got, of_plain, wanted in zip(with_gradient(quick_gelu, x, grad), errors_of_plain, exact, strict=True):
        assert got.dtype == x.dtype
        assert got.shape == x.shape
        if not x.numel():
            continue
        error = (got.double() - wanted).abs().max()
        assert error <= (1e-4 * wanted.abs().max() if x.dtype == torch.float32 else 2 * of_plain)


def test_in_double_precision_it_equals_its_formula():
    x = torch.linspace(-20, 20, 1001, dtype=torch.float64)
    assert torch.allclose(quick_gelu(x), formula(x), rtol=1e-12, atol=1e-15)


def test_gradcheck():
    assert gradcheck(quick_gelu, torch.randn(3, 5, dtype=torch.float64, requires_grad=True))


def test_is_as_close_as_plain_pytorch_at_any_size(backend):
    def check(size, dtype):
        assert_close(torch.randn(size).to(dtype), torch.randn(size).to(dtype))

    sizes = st.sampled_from([0, 1, 5, 127, 128, 129, 1023, 1024, 1025, 4099])
    backend.for_all(check, size=sizes, dtype=st.sampled_from(DTYPES))


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_large_as_a_block_of_the_backbone_makes_them(backend, dtype):
    assert_close(3 * torch.randn(2, 129, 96).to(dtype), torch.randn(2, 129, 96).to(dtype))


STRIDED = {
    "transposed": lambda x: x.transpose(0, 2),
    "without the first": lambda x: x[:, 1:],
    "every other": lambda x: x[..., ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 7, -1),
    "misaligned": lambda x: x.flatten()[1:],
    "channels first": lambda x: x[:, :, None].contiguous(memory_format=torch.channels_last),
    "scalar": lambda x: x[0, 0, 0],
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_any_strides_of_input_and_gradient(backend, view):
    x, grad = torch.randn(4, 7, 18), torch.randn(4, 7, 18)
    assert_close(view(x), view(grad))
    assert_close(view(x), torch.ones(()).expand(view(x).shape))
    assert quick_gelu(view(x)).stride() == torch.empty_like(view(x)).stride()


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_are_those_of_the_formula(backend, dtype):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e4, -1e4, 60.0, -60.0]).to(dtype)
    torch.testing.assert_close(quick_gelu(x), formula(x), equal_nan=True)


def test_the_gradient_far_out_is_one_or_zero(backend):
    x = torch.tensor([-1e4, -80.0, 80.0, 1e4])
    torch.testing.assert_close(with_gradient(quick_gelu, x, torch.ones(4))[1], torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_is_the_same_to_the_bit_whatever_the_schedule(backend):
    x, grad = torch.randn(2, 3000)
    runs = []
    for seed in (1, 2, 3):
        backend.reseed(seed)
        runs.append(with_gradient(quick_gelu, x, grad))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_the_compiler_gets_plain_pytorch_to_merge_with_its_neighbours():
    seen = []

    def keep(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def block(x):
        return quick_gelu(x + 1).sum()

    x = torch.randn(3, 5, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True, backend=keep)
    (grad,) = torch.autograd.grad(compiled(x), x)
    assert seen
    assert not any("signal_reid" in target for target in seen)
    torch.testing.assert_close(grad, torch.autograd.grad(block(x), x)[0])


def test_input_is_left_alone(backend):
    x = torch.randn(4, 3)[:, ::2]
    before = x.clone()
    quick_gelu(x)
    assert torch.equal(x, before)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="x must be float32"):
        quick_gelu(torch.arange(3))

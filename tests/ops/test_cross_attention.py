"""Attention without projected keys and values is PyTorch's multi-head attention over masked tokens."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

from signal_reid import ops
from signal_reid.ops import cross_attention
from signal_reid.ops.backend import BACKENDS
from signal_reid.ops.casting import cast_for_products
from signal_reid.ops.reference import masked_attention

OPERATOR = "cross_attention"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(B=2, L=3, M=3, N=5, h=2, d=4, dtype=torch.float64):
    """Queries and tokens as a ViT leaves them, mask, weight, bias, heads, and a gradient."""
    C = h * d
    encoded = torch.randn(B, max(L, M), 1 + N, C).to(dtype)
    weight, bias = (torch.randn(3 * C, C) * C**-0.5).to(dtype), torch.randn(3 * C).to(dtype)
    arguments = encoded[:, :L, 0], encoded[:, :M, 1:], torch.rand(B, M, N) < 0.6, weight, bias, h
    return arguments, torch.randn(B, L, C).to(dtype)


def by_pytorch(queries, tokens, mask, weight, bias, heads):
    attention = nn.MultiheadAttention(queries.shape[-1], heads, batch_first=True, dtype=queries.dtype)
    del attention.in_proj_weight, attention.in_proj_bias
    attention.in_proj_weight, attention.in_proj_bias = weight, bias
    attention.out_proj.load_state_dict({"weight": torch.eye(queries.shape[-1]), "bias": torch.zeros_like(bias[::3])})
    x = (tokens * mask[..., None]).flatten(1, 2)
    return attention(queries, x, x)[0]


def plain(*arguments):
    """The same without a token projected, in operators that PyTorch differentiates."""
    with mock.patch.object(cross_attention, "attend_masked", lambda *x: masked_attention.forward(*x)[0]):
        return cross_attention._formula(*arguments)


def textbook(queries, tokens, mask, weight, bias, heads):
    """Every token projected."""
    x = (tokens * mask[..., None]).flatten(1, 2)
    projections = zip((queries, x, x), weight.chunk(3), bias.chunk(3), strict=True)
    d = queries.shape[2] // heads
    q, k, v = (F.linear(y, w, b).unflatten(-1, (heads, d)).transpose(1, 2) for y, w, b in projections)
    return ((q @ k.mT * d**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def results_of(function, arguments, grad):
    """The output and the gradients of queries, tokens, weight and bias."""
    queries, tokens, mask, weight, bias, heads = arguments
    leaves = [x.detach().requires_grad_() for x in (queries, tokens, weight, bias)]
    output = function(*leaves[:2], mask, *leaves[2:], heads)
    return output, *torch.autograd.grad(output, leaves, grad)


def assert_same(got, wanted, **tolerances):
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerances)


def test_is_as_close_as_plain_pytorch_at_any_size(backend, assert_as_close_as_plain):
    """Three roundings follow each other in any order of products: of query, of what it attends to, of the result."""
    plainly = textbook if backend.name == "reference" else plain  # each rounds what it computes

    def check(B, L, M, N, h, d, dtype):
        (queries, tokens, mask, weight, bias, heads), grad = draw(B, L, M, N, h, d, dtype)
        of = [lambda q, x, w, b, f=f: f(q, x, mask, w, b, heads) for f in (ops.cross_attend, plainly)]
        assert_as_close_as_plain(*of, [queries, tokens, weight, bias], grad, roundings=3)

    backend.examples = min(backend.examples, 12)
    backend.for_all(
        check,
        B=st.integers(0, 3),
        L=st.sampled_from([0, 1, 3]),
        M=st.integers(1, 4),
        N=st.sampled_from([1, 5, 33]),
        h=st.sampled_from([1, 4]),
        d=st.sampled_from([1, 3, 8]),
        dtype=st.sampled_from(DTYPES),
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_in_fp64_it_is_multi_head_attention(backend):
    arguments, grad = draw()
    assert_same(*(results_of(f, arguments, grad) for f in (ops.cross_attend, by_pytorch)), rtol=1e-9, atol=1e-11)


def test_the_formula_for_the_compiler_is_multi_head_attention():
    arguments, grad = draw()
    functions = plain, by_pytorch
    assert_same(*(results_of(f, arguments, grad) for f in functions), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_gradcheck(backend):
    (queries, tokens, mask, weight, bias, _), _ = draw(B=1, L=2, N=2, h=1, d=2)
    leaves = [x.detach().requires_grad_() for x in (queries, tokens, weight, bias)]
    assert gradcheck(lambda q, x, w, b: ops.cross_attend(q, x, mask, w, b, 1), leaves)


@pytest.mark.parametrize("first", BACKENDS)
def test_a_backend_takes_over_from_another_between_the_two_passes(backend, first, takes):
    (queries, tokens, mask, weight, bias, heads), grad = draw(dtype=torch.float32)
    leaves = [x.detach().requires_grad_() for x in (queries, tokens, weight, bias)]
    with ops.use_backend(first if takes(first, queries) else "reference"):
        output = ops.cross_attend(*leaves[:2], mask, *leaves[2:], heads)
    got = output, *torch.autograd.grad(output, leaves, grad)
    wanted = results_of(plain, (queries, tokens, mask, weight, bias, heads), grad)
    assert_same(got, wanted, rtol=1e-4, atol=1e-5)


def test_each_gradient_is_written_where_it_belongs():
    arguments, grad = draw(dtype=torch.float32)
    _, *grads = results_of(ops.cross_attend, arguments, grad)
    assert all(x.is_contiguous() for x in grads)
    assert (grads[3][8:16] == 0).all()  # the keys' bias changes nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_makes_it_multiply_in_its_precision(backend, dtype):
    (queries, tokens, mask, weight, bias, heads), _ = draw(dtype=torch.float32)
    with torch.autocast(queries.device.type, dtype):
        inside = ops.cross_attend(queries, tokens, mask, weight, bias, heads)
    outside = ops.cross_attend(queries.to(dtype), tokens, mask, weight.to(dtype), bias.to(dtype), heads)
    assert inside.dtype == dtype
    assert torch.equal(inside, outside)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads must divide the 8 channels of queries, got 3"),
        ({"heads": 0}, "heads must divide the 8 channels of queries, got 0"),
        ({"queries": torch.randn(2, 8)}, r"queries must be \(B, L, C\)"),
        ({"tokens": torch.randn(2, 3, 5, 7)}, r"queries must be \(2, Q, 7\)"),
        ({"mask": torch.ones(2, 3, 5)}, r"mask must be \(2, 3, 5\) bool"),
        ({"weight": torch.randn(24, 7)}, r"weight must have shape \(24, 8\)"),
        ({"bias": torch.randn(24).double()}, "bias must have the dtype of queries"),
    ],
)
def test_bad_input_is_named(change, message):
    names = ("queries", "tokens", "mask", "weight", "bias", "heads")
    arguments = dict(zip(names, draw(dtype=torch.float32)[0], strict=True))
    with pytest.raises(ValueError, match=message):
        ops.cross_attend(**arguments | change)


def test_parameters_are_cast_and_their_gradients_cast_back():
    x = [torch.randn(3, 2).requires_grad_(), torch.randn(4), torch.randn(4).requires_grad_()]
    assert all(a is b for a, b in zip(cast_for_products(*x), x, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        cast = cast_for_products(*x)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(cast, x, strict=True))
    grad = torch.randn(3, 2).bfloat16()
    used, unused = torch.autograd.grad(cast[0], (x[0], x[2]), grad, allow_unused=True)
    assert torch.equal(used, grad.float())
    assert unused is None


def test_a_cast_can_be_differentiated_twice():
    x = torch.randn(3).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = cast_for_products(x)
    (once,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    assert torch.equal(torch.autograd.grad(once.sum(), x)[0], torch.full((3,), 2.0))

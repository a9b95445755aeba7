"""Attention over tokens times their mask equals its formula and differentiates it."""

import pytest
import torch
from hypothesis import strategies as st
from torch.autograd import gradcheck

from signal_reid import ops
from signal_reid.ops.backend import BACKENDS
from signal_reid.ops.cuda import masked_attention as on_cuda
from signal_reid.ops.reference import masked_attention as oracle

OPERATOR = "masked_attention"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def formula(queries, tokens, mask):
    x = (tokens * mask[..., None]).flatten(1, 2)  # (B, M * N, C)
    wide = torch.promote_types(queries.dtype, torch.float32)
    return (queries @ x.mT).softmax(-1, dtype=wide).to(queries.dtype) @ x


def draw(B=2, Q=4, M=3, N=6, C=5, dtype=torch.float64):
    """Queries, tokens behind a class token, mask and a gradient."""
    queries = (torch.randn(B, Q, C) * C**-0.5).to(dtype)
    tokens = torch.randn(B, M, 1 + N, C).to(dtype)[:, :, 1:]
    return queries, tokens, torch.rand(B, M, N) < 0.6, torch.randn(B, Q, C).to(dtype)


def test_is_as_close_as_plain_pytorch_at_any_size(backend, assert_as_close_as_plain):
    def check(B, Q, M, N, C, dtype):
        queries, tokens, mask, grad = draw(B, Q, M, N, C, dtype)
        functions = (lambda u, x, f=f: f(u, x, mask) for f in (ops.attend_masked, formula))
        assert_as_close_as_plain(*functions, [queries, tokens], grad)

    backend.for_all(
        check,
        B=st.integers(0, 2),
        Q=st.sampled_from([0, 1, 24]),
        M=st.integers(1, 4),
        N=st.sampled_from([1, 5, 127, 129]),
        C=st.sampled_from([1, 8, 33]),
        dtype=st.sampled_from(DTYPES),
    )


def test_in_fp64_the_oracle_is_its_formula():
    queries, tokens, mask, grad = draw()
    leaves = queries.clone().requires_grad_(), tokens.clone().requires_grad_()
    expected = formula(*leaves, mask)
    attended, kept = oracle.forward(queries, tokens, mask)
    assert torch.allclose(attended, expected, rtol=1e-12)
    derived = oracle.backward(grad, queries, tokens, mask, attended, kept)
    for got, wanted in zip(derived, torch.autograd.grad(expected, leaves, grad), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_gradcheck(backend):
    queries, tokens, mask, _ = draw(B=1, Q=2, N=3)
    leaves = queries.requires_grad_(), tokens.detach().requires_grad_()
    assert gradcheck(lambda u, x: ops.attend_masked(u, x, mask), leaves)


def test_a_masked_token_gets_no_gradient(backend):
    queries, tokens, mask, _ = draw(dtype=torch.float32)
    leaf = tokens.detach().requires_grad_()
    ops.attend_masked(queries, leaf, mask).square().sum().backward()
    assert (leaf.grad[~mask] == 0).all()
    assert (leaf.grad[mask] != 0).any(-1).all()


def test_all_tokens_masked_are_all_zero_vectors(backend):
    queries, tokens, mask, _ = draw(dtype=torch.float32)
    assert (ops.attend_masked(queries, tokens, torch.zeros_like(mask)) == 0).all()


def test_low_precision_queries_lead_and_each_gradient_has_its_input_s_dtype(backend):
    queries, tokens, mask, _ = draw()
    queries, tokens = (x.detach().to(d).requires_grad_() for x, d in ((queries, torch.bfloat16), (tokens, torch.float)))
    z = ops.attend_masked(queries, tokens, mask)
    z.sum().backward()
    assert (z.dtype, queries.grad.dtype, tokens.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_any_strides_of_inputs_and_gradients(backend):
    queries, tokens, mask, grad = draw(B=2, Q=4, M=3, N=6, C=8, dtype=torch.float32)
    turned = [x.mT.contiguous().mT for x in (queries, tokens, grad)]
    masks = torch.stack([mask, ~mask], -1)[..., 0]

    def gradients(function, queries, tokens, mask, grad):
        leaves = queries.detach().requires_grad_(), tokens.detach().requires_grad_()
        return torch.autograd.grad(function(*leaves, mask), leaves, grad)

    got = gradients(ops.attend_masked, *turned[:2], masks, turned[2])
    for ours, wanted in zip(got, gradients(formula, queries, tokens, mask, grad), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", BACKENDS)
def test_a_backend_takes_over_from_another_between_the_two_passes(backend, first, takes):
    queries, tokens, mask, grad = draw(dtype=torch.float32)
    leaves = queries.requires_grad_(), tokens.detach().requires_grad_()
    with ops.use_backend(first if takes(first, queries) else "reference"):
        z = ops.attend_masked(*leaves, mask)
    expected = torch.autograd.grad(formula(*leaves, mask), leaves, grad)
    for got, wanted in zip(torch.autograd.grad(z, leaves, grad), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
def test_any_share_of_the_tokens_may_be_kept(backend, assert_as_close_as_plain, share):
    queries, tokens, _, grad = draw(B=1, Q=3, M=3, N=129, C=8, dtype=torch.float32)
    mask = torch.rand(1, 3, 129) < share
    functions = (lambda u, x, f=f: f(u, x, mask) for f in (ops.attend_masked, formula))
    assert_as_close_as_plain(*functions, [queries, tokens], grad)


@pytest.mark.parametrize("sizes", [{"dtype": torch.float32}, {"dtype": torch.bfloat16, "C": 8, "N": 40}])
def test_what_is_dropped_takes_no_part_whatever_it_holds(backend, sizes):
    if backend.name in ("reference", "cpu"):
        pytest.skip("multiplies by the mask")
    queries, tokens, mask, grad = draw(**sizes)
    expected = ops.attend_masked(queries, tokens, mask)
    leaf = torch.where(mask[..., None], tokens, torch.nan).requires_grad_()
    z = ops.attend_masked(queries, leaf, mask)
    assert torch.equal(z, expected)
    assert torch.autograd.grad(z, leaf, grad)[0].isfinite().all()


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensor_cores_take_each_token_where_it_lies(backend, dtype):
    """Every query points at one token so sharply that what it attends to is that token, to the bit.

    Tokens and gradients are integers, so an element that comes from a wrong row or channel shows.
    """
    M, N, C, Q = 2, 50, 136, 17  # three warps, the last with 8 channels; two tiles and a part of one
    tokens = torch.randint(-8, 9, (1, M, N, C)).to(dtype)
    pointed = torch.randperm(M * N)[:Q]
    tokens.view(M * N, C)[:, :Q] = 0
    tokens.view(M * N, C)[pointed, torch.arange(Q)] = 8
    queries, grad = torch.zeros(1, Q, C, dtype=dtype), torch.randint(-8, 9, (1, Q, C)).to(dtype)
    queries[0, torch.arange(Q), torch.arange(Q)] = 64
    mask = torch.rand(M * N) < 0.7
    mask[pointed] = True
    leaves = queries.requires_grad_(), tokens.requires_grad_()
    z = ops.attend_masked(*leaves, mask.view(1, M, N))
    of_queries, of_tokens = torch.autograd.grad(z, leaves, grad)
    assert torch.equal(z[0], tokens.view(M * N, C)[pointed])
    assert torch.equal(of_tokens.view(M * N, C), torch.zeros(M * N, C, dtype=dtype).index_copy(0, pointed, grad[0]))
    assert (of_queries == 0).all()


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize(("dtype", "splits"), [(torch.float16, 1), (torch.bfloat16, 3)])
def test_tensor_cores_are_as_close_as_plain_pytorch(backend, assert_as_close_as_plain, monkeypatch, dtype, splits):
    monkeypatch.setattr(on_cuda, "_splits", lambda *_: splits)
    queries, tokens, mask, grad = draw(B=1, Q=24, M=3, N=61, C=88, dtype=dtype)
    queries, grad = (torch.cat([x, x], 1)[:, ::2] for x in (queries, grad))  # rows with a gap
    functions = (lambda u, x, f=f: f(u, x, mask) for f in (ops.attend_masked, formula))
    assert_as_close_as_plain(*functions, [queries, tokens], grad)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_tensor_cores_list_more_tokens_than_a_block_does_at_a_time(backend, assert_as_close_as_plain):
    queries, tokens, _, grad = draw(B=1, Q=2, M=4, N=300, C=8, dtype=torch.bfloat16)
    mask = (torch.arange(1200) % 512 < 40).view(1, 4, 300)
    functions = (lambda u, x, f=f: f(u, x, mask) for f in (ops.attend_masked, formula))
    assert_as_close_as_plain(*functions, [queries, tokens], grad)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_large_logits_do_not_overflow(backend, scale):
    queries, tokens, mask, grad = draw(N=40, dtype=torch.float32)
    leaves = (scale * queries).round().requires_grad_(), tokens.round().detach().requires_grad_()
    z = ops.attend_masked(*leaves, mask)
    torch.testing.assert_close(z, formula(*leaves, mask))
    assert all(of_leaf.isfinite().all() for of_leaf in torch.autograd.grad(z, leaves, grad))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_logit_may_come_first_last_or_be_that_of_the_dropped(backend, sign):
    tokens = sign * torch.arange(1.0, 401.0).view(1, 2, 200, 1)
    mask = (torch.arange(400) % 3 > 0).view(1, 2, 200)
    queries = torch.tensor([[[1.0], [-1.0], [0.0]]])
    torch.testing.assert_close(ops.attend_masked(queries, tokens, mask), formula(queries, tokens, mask))


def test_what_is_not_a_number_stays_in_its_sample(backend):
    queries, tokens, mask, grad = draw(dtype=torch.float32)
    tokens[1, 2, 3, 4] = torch.nan
    leaf = tokens.detach().requires_grad_()
    z = ops.attend_masked(queries, leaf, torch.ones_like(mask))
    (of_tokens,) = torch.autograd.grad(z, leaf, grad)
    assert z[0].isfinite().all()
    assert z[1].isnan().all()
    assert of_tokens[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_makes_it_multiply_in_its_precision(backend, dtype):
    queries, tokens, mask, grad = draw(dtype=torch.float32)
    leaves = queries.requires_grad_(), tokens.detach().requires_grad_()
    with torch.autocast(queries.device.type, dtype):
        inside = ops.attend_masked(*leaves, mask)
    outside = ops.attend_masked(leaves[0].to(dtype), leaves[1], mask)
    assert inside.dtype == dtype
    assert torch.equal(inside, outside)
    gradients = (torch.autograd.grad(z, leaves, grad.to(dtype)) for z in (inside, outside))
    for got, wanted in zip(*gradients, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_cuda_refuses_more_queries_or_channels_than_its_threads_hold(backend):
    for sizes in ({"Q": 25}, {"C": 513}):
        queries, tokens, mask, _ = draw(**sizes, dtype=torch.float32)
        with pytest.raises(ops.BackendError, match="at most 24 queries, 512 channels"):
            ops.attend_masked(queries, tokens, mask)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_triton_refuses_more_queries_than_a_block_holds(backend):
    queries, tokens, mask, _ = draw(Q=65, dtype=torch.float32)
    with pytest.raises(ops.BackendError, match="at most 64"):
        ops.attend_masked(queries, tokens, mask)


@pytest.mark.parametrize(("B", "tokens", "splits"), [(64, 384, 1), (41, 384, 2), (8, 384, 8), (1, 5, 1), (1, 40, 2)])
def test_a_sample_is_split_only_where_multiprocessors_would_be_idle(B, tokens, splits):
    assert on_cuda._splits(82, B, tokens) == splits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"queries": torch.randn(1, 4, 4)},
            r"queries must be \(2, Q, 4\) on cpu to go with tokens, got shape \(1, 4, 4\)",
        ),
        ({"queries": torch.randn(2, 4, 5)}, r"queries must be \(2, Q, 4\)"),
        ({"tokens": torch.randn(2, 3, 4)}, r"tokens must be \(B, M, N, C\)"),
        ({"tokens": torch.randn(2, 3, 0, 4)}, r"tokens must hold at least one token"),
        ({"mask": torch.ones(2, 3, 5, dtype=torch.bool)}, r"mask must be \(2, 3, 6\) bool"),
        ({"mask": torch.ones(2, 3, 6)}, "got shape .* torch.float32 on cpu"),
    ],
)
def test_bad_input_is_named(change, message):
    queries, tokens, mask, _ = draw(C=4, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        ops.attend_masked(**{"queries": queries, "tokens": tokens, "mask": mask} | change)

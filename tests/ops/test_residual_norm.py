"""Residual addition and layer normalisation equal PyTorch's own two steps and their gradients, on every backend."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.autograd import gradcheck

from signal_reid import ops
from signal_reid.ops.reference import residual_norm as reference

LIBRARY = torch.ops.signal_reid
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Residual stream, branch (None for none), weight, output.
DTYPES = {
    "fp32": (FP32, FP32, FP32, FP32),
    "autocast bf16": (FP32, BF16, FP32, BF16),
    "autocast fp16": (FP32, FP16, FP32, FP16),
    "no branch": (FP32, None, FP32, BF16),
    "bf16": (BF16, BF16, BF16, BF16),
    "fp16, weight fp32": (FP16, FP16, FP32, FP16),
    "branch wider": (BF16, FP32, FP32, FP32),
    "two halves": (BF16, FP16, FP32, FP16),
}
WIDTHS = [1, 5, 127, 768, 1024]


def plain(x, branch, weight, bias, eps=1e-5, out_dtype=None):
    """The two steps as PyTorch does them, the normalisation in the dtype of the weight."""
    total = x if branch is None else x + branch
    normed = F.layer_norm(total.to(weight.dtype), weight.shape, weight, bias, eps)
    return total, normed.to(out_dtype or total.dtype)


def inputs(rows, width, dtypes=DTYPES["fp32"]):
    """x, branch, weight, bias and the gradients of the sum and of its normalisation."""
    x_dtype, branch_dtype, weight_dtype, out_dtype = dtypes
    x = (3 * torch.randn(rows, width) + 1).to(x_dtype)
    branch = None if branch_dtype is None else torch.randn(rows, width).to(branch_dtype)
    weight, bias = (torch.randn(width).to(weight_dtype) for _ in range(2))
    total_dtype = x_dtype if branch is None else torch.promote_types(x_dtype, branch_dtype)
    grads = torch.randn(rows, width).to(total_dtype), torch.randn(rows, width).to(out_dtype)
    return (x, branch, weight, bias), grads


def with_gradients(function, arguments, grads, out_dtype=None):
    """Sum and normalised sum, then the gradients of x, branch (if any), weight and bias."""
    leaves = [None if a is None else a.detach().requires_grad_() for a in arguments]
    total, normed = function(*leaves, out_dtype=out_dtype or grads[1].dtype)
    used = [leaf for leaf in leaves if leaf is not None]
    return total.detach(), normed.detach(), *torch.autograd.grad((total, normed), used, grads)


def assert_close(arguments, grads):
    """To twice the error of plain PyTorch in the same dtypes, or in fp32 to 1e-4 of the largest magnitude."""
    wide = [None if a is None else a.double() for a in arguments]
    exact = with_gradients(plain, wide, [g.double() for g in grads], torch.float64)
    of_plain = with_gradients(plain, arguments, grads)
    got = with_gradients(ops.add_layer_norm, arguments, grads)
    for ours, theirs, wanted in zip(got, of_plain, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        if not wanted.numel():
            continue
        error, of_theirs = ((y.double() - wanted).abs().max() for y in (ours, theirs))
        close = 1e-4 * wanted.abs().max() if ours.dtype == FP32 else 0
        assert error <= max(close, 2 * of_theirs)


def test_the_oracle_is_pytorchs_layer_norm_and_its_backward_the_derivative():
    arguments, _ = inputs(7, 6)
    leaves = [a.double().requires_grad_() for a in arguments]

    def oracle(*leaves):
        return reference.forward(*leaves, 1e-5, torch.float64)

    assert gradcheck(oracle, leaves)
    (total, normed), expected = oracle(*leaves), plain(*leaves)
    assert torch.allclose(total, expected[0], rtol=1e-12)
    assert torch.allclose(normed, expected[1], rtol=1e-12)
    grads = torch.randn_like(total), torch.randn_like(normed)
    grad_x, grad_branch, *grad_affine = torch.autograd.grad((total, normed), leaves, grads)
    assert torch.equal(grad_x, grad_branch)
    derived = reference.backward(grads[1], grads[0], total, leaves[2], 1e-5, None)
    for ours, wanted in zip(derived, (grad_x, torch.stack(grad_affine)), strict=True):
        assert torch.allclose(ours, wanted, rtol=1e-10, atol=1e-12)


def test_is_as_close_as_plain_pytorch_at_any_size(backend):
    def check(rows, width, dtypes):
        assert_close(*inputs(rows, width, DTYPES[dtypes]))

    backend.for_all(
        check, rows=st.sampled_from([0, 1, 5, 37]), width=st.sampled_from(WIDTHS), dtypes=st.sampled_from(list(DTYPES))
    )


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_every_combination_of_dtypes(backend, dtypes):
    assert_close(*inputs(9, 40, dtypes))


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_of_transformers_and_odd_ones(backend, width):
    assert_close(*inputs(6, width, DTYPES["autocast bf16"]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_the_shape_of_the_backbone(backend, dtypes):
    if backend.name in ("reference", "cpu"):
        pytest.skip("has no kernel on a GPU")
    assert_close(*inputs(192 * 129, 768, dtypes))


VIEWS = {
    "without the first": lambda x: x[:, 1:],
    "transposed": lambda x: x.transpose(0, 1),
    "every other channel": lambda x: torch.cat([x, x], -1)[..., ::2],
    "misaligned": lambda x: torch.cat([x.flatten(), x.new_zeros(1)])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand(3, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides_of_inputs_and_gradients(backend, view):
    (x, branch, weight, bias), grads = inputs(3 * 5, 16)
    x, branch, *grads = (view(t.view(3, 5, 16)) for t in (x, branch, *grads))
    assert_close((x, branch, torch.stack([weight, bias], 1)[:, 0], bias), grads)


def test_a_mean_far_from_zero_keeps_its_digits(backend):
    (x, branch, weight, bias), grads = inputs(5, 768)
    assert_close((x + 1000, branch, weight, bias), grads)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_in_its_row(backend, poison):
    (x, branch, weight, bias), grads = inputs(6, 33)
    branch[2, 7] = poison
    total, normed, grad_x, *_ = with_gradients(ops.add_layer_norm, (x, branch, weight, bias), grads)
    assert not total[2, 7].isfinite()
    others = torch.arange(6) != 2
    for result in (normed, grad_x):
        assert result[2].isnan().all()
        assert result[others].isfinite().all()


def test_rows_without_deviation_give_the_bias_and_finite_gradients(backend):
    (x, branch, weight, bias), grads = inputs(4, 24)
    results = with_gradients(ops.add_layer_norm, (torch.ones_like(x), torch.zeros_like(branch), weight, bias), grads)
    torch.testing.assert_close(results[1], bias.expand(4, -1))
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("used", [0, 1])
def test_either_result_alone_has_its_gradient(backend, used):
    arguments, grads = inputs(5, 12, DTYPES["autocast bf16"])

    def gradients(function):
        leaves = [a.detach().requires_grad_() for a in arguments]
        output = function(*leaves, out_dtype=BF16)[used]
        return torch.autograd.grad(output, leaves, grads[used], materialize_grads=True)

    for ours, wanted in zip(gradients(ops.add_layer_norm), gradients(plain), strict=True):
        assert ours.dtype == wanted.dtype
        torch.testing.assert_close(ours, wanted, rtol=2e-2, atol=2e-2)


def test_frozen_weights_and_inputs_without_gradient_are_served(backend):
    (x, branch, weight, bias), grads = inputs(5, 12)
    total, normed = ops.add_layer_norm(x, branch.requires_grad_(), weight, bias)
    (grad,) = torch.autograd.grad((total, normed), branch, grads)
    assert torch.allclose(grad, with_gradients(plain, (x, branch, weight, bias), grads)[3], rtol=1e-4, atol=1e-5)
    assert not ops.add_layer_norm(x, branch.detach(), weight, bias)[1].requires_grad


def test_is_the_same_to_the_bit_every_time(backend):
    arguments, grads = inputs(40, 24, DTYPES["autocast bf16"])
    first = with_gradients(ops.add_layer_norm, arguments, grads)
    for seed in (1, 2):
        backend.reseed(seed)
        again = with_gradients(ops.add_layer_norm, arguments, grads)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_inputs_are_left_alone(backend):
    arguments, grads = inputs(3, 8)
    before = [a.clone() for a in (*arguments, *grads)]
    with_gradients(ops.add_layer_norm, arguments, grads)
    assert all(torch.equal(a, b) for a, b in zip((*arguments, *grads), before, strict=True))


def test_without_a_branch_the_sum_is_the_input_itself(backend):
    (x, _, weight, bias), _ = inputs(3, 8)
    assert ops.add_layer_norm(x, None, weight, bias)[0].data_ptr() == x.data_ptr()


LIBRARY_CASES = {
    "add_layer_norm": (torch.randn(3, 8), torch.randn(3, 8).half(), torch.randn(8), torch.randn(8), 1e-5, FP16),
    "layer_norm": (torch.randn(3, 8), torch.randn(8), torch.randn(8), 1e-5, BF16),
    "add_layer_norm_backward": (torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 8), torch.randn(8), 1e-5, BF16),
    "add_layer_norm_backward alone": (torch.randn(3, 8), None, torch.randn(3, 8), torch.randn(8), 1e-5, None),
}


@pytest.mark.parametrize("case", LIBRARY_CASES)
def test_opcheck(case):
    torch.library.opcheck(getattr(LIBRARY, case.split()[0]).default, LIBRARY_CASES[case])


@pytest.mark.parametrize("dtypes", ["fp32", "autocast bf16", "no branch"])
def test_compiles_without_a_graph_break_into_operators_that_the_compiler_fuses(backend, dtypes):
    arguments, grads = inputs(4, 16, DTYPES[dtypes])
    graphs = []
    torch.compiler.reset()  # past a few recompilations of one function PyTorch gives up

    def collect(graph, example):
        graphs.append(graph)
        return graph.forward

    def compiled(*leaves, out_dtype):
        return torch.compile(ops.add_layer_norm, fullgraph=True, backend=collect)(*leaves, out_dtype=out_dtype)

    eager, traced = (with_gradients(f, arguments, grads) for f in (plain, compiled))
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))
    assert "signal_reid" not in str(graphs[0].graph)


def test_more_channels_than_a_block_of_the_native_core_owns(backend):
    assert_close(*inputs(2, 5120, DTYPES["autocast bf16"]))
    wider, _ = inputs(2, 5128)
    if backend.name == "cuda":
        with pytest.raises(ops.BackendError, match="backend cuda cannot normalise 5128 channels: at most 5120"):
            ops.add_layer_norm(*wider)
    else:
        assert ops.add_layer_norm(*wider)[1].shape == (2, 5128)


def test_second_derivative_through_a_kernel_is_refused(backend):
    if backend.name == "cpu":
        pytest.skip("it has no kernel, and PyTorch's own has one")
    (x, branch, weight, bias), _ = inputs(3, 8)
    normed = ops.add_layer_norm(x.requires_grad_(), branch, weight, bias)[1]
    with pytest.raises(RuntimeError, match="add_layer_norm is not differentiable twice"):
        torch.autograd.grad(normed.sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 0)}, r"x must be \(\.\.\., C\) with at least one channel, got shape \(2, 0\)"),
        ({"x": torch.ones(2, 4).long()}, "x must be float32, float16, bfloat16 or float64, got torch.int64"),
        ({"branch": torch.ones(1, 4)}, r"branch must have the shape and device of x, \(2, 4\) on cpu, got \(1, 4\)"),
        ({"branch": torch.ones(2, 4).bool()}, "branch must be float32, float16, bfloat16 or float64, got torch.bool"),
        ({"weight": torch.ones(5)}, r"weight must have shape \(4,\) \(C of x\) on cpu, got \(5,\)"),
        ({"bias": torch.ones(4, 1)}, r"bias must have shape \(4,\) \(C of x\) on cpu, got \(4, 1\)"),
        ({"bias": torch.ones(4).double()}, "weight and bias must both be torch.float32 to go with x"),
        ({"weight": torch.ones(4).half()}, "got torch.float16 and torch.float32"),
        ({"out_dtype": torch.int32}, "out_dtype must be float32, float16, bfloat16 or float64, got torch.int32"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    ones = {"x": torch.ones(2, 4), "branch": torch.ones(2, 4), "weight": torch.ones(4), "bias": torch.ones(4)}
    with pytest.raises(ValueError, match=message):
        ops.add_layer_norm(**{**ones, **change})

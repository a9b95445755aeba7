"""The offset head equals the layers of which it consists, and differentiates them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.autograd import gradcheck

from signal_reid import ops
from signal_reid.ops.cuda import offset_head as on_cuda

OPERATOR = "offset_head"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def by_layers(hidden, bias, window, window_bias, out, grid_size):
    """PyTorch's own layers, modality by modality."""
    offsets = []
    for x, *head in zip(hidden, bias, window, window_bias, out, strict=True):
        b, w, e, v = (parameter.to(x.dtype) for parameter in head)
        x = F.gelu(x + b).unflatten(1, grid_size).permute(0, 3, 1, 2)
        x = F.gelu(F.conv2d(x, w.unsqueeze(1), e, stride=4, groups=len(w)))
        offsets.append(F.conv2d(x, v.view(1, -1, 1, 1)).squeeze(1))
    return torch.stack(offsets)


def by_windows(hidden, bias, window, window_bias, out, grid_size):
    """The same without a convolution, whose backward a CPU is slow at in low precision."""
    x = F.gelu(hidden + bias[:, None, None]).unflatten(2, grid_size)
    windows = x.unfold(2, 4, 4).unfold(3, 4, 4)  # (M, B, Hk, Wk, C, 4, 4)
    u = (windows * window[:, None, None, None]).sum((-2, -1)) + window_bias[:, None, None, None]
    return (F.gelu(u) * out[:, None, None, None]).sum(-1)


def predict(hidden, *parameters, grid_size):
    return ops.predict_offsets(hidden, grid_size, *parameters)


def draw(M=2, B=2, grid=(5, 8), C=6, dtype=torch.float32):
    """Hidden tokens behind a class token, parameters, and a gradient."""
    H, W = grid
    hidden = torch.randn(M, B, 1 + H * W, C)[:, :, 1:]
    parameters = torch.randn(M, C), torch.randn(M, C, 4, 4) / 4, torch.randn(M, C), torch.randn(M, C)
    return [x.to(dtype) for x in (hidden, *parameters)], torch.randn(M, B, H // 4, W // 4).to(dtype)


def both_ways(function, inputs, grad, **settings):
    """Offsets and the gradient of every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    offsets = function(*leaves, **settings)
    return offsets.detach(), *torch.autograd.grad(offsets, leaves, grad)


def assert_close(results, exact, rtol=1e-4):
    for got, wanted in zip(results, exact, strict=True):
        assert got.shape == wanted.shape
        assert not wanted.numel() or (got.double() - wanted).abs().max() <= rtol * wanted.abs().max()


def in_double(inputs):
    return [x.double() for x in inputs]


def test_is_as_close_as_plain_pytorch_at_any_size(backend, assert_as_close_as_plain):
    def check(M, B, grid, C, dtype):
        if backend.interpreted:  # the interpreter is slow
            M, B = min(M, 2), 1
        inputs, grad = draw(M, B, grid, C, dtype)
        functions = (lambda *x, f=f: f(*x, grid_size=grid) for f in (predict, by_windows))
        assert_as_close_as_plain(*functions, inputs, grad)

    backend.examples = 3 if backend.interpreted else min(backend.examples, 12)
    backend.for_all(
        check,
        M=st.integers(1, 3),
        B=st.integers(1, 2),
        grid=st.sampled_from([(4, 4), (8, 4), (9, 13), (7, 6)]),
        C=st.sampled_from([1, 6, 129]),
        dtype=st.sampled_from(DTYPES),
    )


@pytest.mark.parametrize("choice", ["reference", "auto"])
def test_gradcheck_and_the_layers_in_fp64(choice):
    inputs, grad = draw(B=1, grid=(5, 4), C=2, dtype=torch.float64)
    with ops.use_backend(choice):
        results = both_ways(predict, inputs, grad, grid_size=(5, 4))
        assert_close(results, both_ways(by_layers, inputs, grad, grid_size=(5, 4)), rtol=1e-10)
        leaves = [x.detach().requires_grad_() for x in inputs]
        assert gradcheck(lambda *x: predict(*x, grid_size=(5, 4)), leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_may_be_wider_than_the_hidden_tokens(backend, dtype):
    (hidden, *parameters), grad = draw(C=8)
    hidden, grad = hidden.to(dtype), grad.to(dtype)
    results = both_ways(predict, [hidden, *parameters], grad, grid_size=(5, 8))
    assert [x.dtype for x in results] == [dtype, dtype, *[torch.float32] * 4]
    assert_close(
        results, both_ways(by_layers, in_double([hidden, *parameters]), grad.double(), grid_size=(5, 8)), rtol=1e-2
    )


def test_parameters_may_be_narrower_than_the_hidden_tokens(backend):
    (hidden, *parameters), grad = draw(C=8)
    parameters = [x.bfloat16() for x in parameters]
    results = both_ways(predict, [hidden, *parameters], grad, grid_size=(5, 8))
    assert [x.dtype for x in results[2:]] == [torch.bfloat16] * 4
    assert_close(
        results, both_ways(by_layers, in_double([hidden, *parameters]), grad.double(), grid_size=(5, 8)), rtol=1e-2
    )


def test_any_strides(backend):
    (hidden, *parameters), grad = draw(grid=(4, 8), C=8)
    exact = both_ways(by_layers, in_double([hidden, *parameters]), torch.ones_like(grad).double(), grid_size=(4, 8))
    views = (
        hidden.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([hidden, hidden], -1)[..., 0],
        torch.cat([hidden[..., :1], hidden], -1)[..., 1:],
    )
    for view in views:
        turned = [torch.stack([p, p], -1)[..., 1] for p in parameters]
        ones = torch.ones(()).expand(grad.shape)
        assert_close(both_ways(predict, [view, *turned], ones, grid_size=(4, 8)), exact)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_tensors_off_16_bytes(backend):
    inputs, grad = draw(C=8)
    off = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in inputs]
    results, exact = (both_ways(predict, x, grad, grid_size=(5, 8)) for x in (off, inputs))
    assert_close(results, in_double(exact), rtol=1e-5)


@pytest.mark.parametrize(("B", "grid", "C"), [(0, (8, 8), 4), (2, (3, 8), 4), (2, (8, 8), 0), (2, (0, 4), 4)])
def test_nothing_to_see_gives_offsets_and_gradients_of_zero(backend, B, grid, C):
    inputs, grad = draw(B=B, grid=grid, C=C)
    offsets, *gradients = both_ways(predict, inputs, grad, grid_size=grid)
    assert offsets.shape == grad.shape
    assert (offsets == 0).all()
    for x, gradient in zip(inputs, gradients, strict=True):
        assert gradient.shape == x.shape
        assert (gradient == 0).all()


def test_what_is_not_a_number_stays_in_its_window_and_beyond_the_last_is_not_read(backend):
    (hidden, *parameters), grad = draw(M=1, B=1, grid=(9, 8), C=3)
    hidden[0, 0, 2 * 8 + 5, 1] = torch.nan
    hidden[0, 0, 64:] = torch.nan
    offsets, of_hidden, *_ = both_ways(predict, [hidden, *parameters], grad, grid_size=(9, 8))
    assert offsets.isnan().nonzero().tolist() == [[0, 0, 0, 1]]
    assert (of_hidden[0, 0, 64:] == 0).all()
    assert of_hidden[0, 0, :64].isfinite().all(-1).sum() == 48  # all but its window's


@pytest.mark.parametrize("far", [-30.0, -6.0, 6.0])
def test_far_from_zero_the_activation_is_that_of_erf(backend, far):
    (hidden, *parameters), grad = draw(C=4)
    inputs = [0.1 * hidden + far, *parameters]
    exact = both_ways(by_layers, in_double(inputs), grad.double(), grid_size=(5, 8))
    for got, wanted in zip(both_ways(predict, inputs, grad, grid_size=(5, 8)), exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_is_the_same_to_the_bit_whatever_the_schedule(backend):
    inputs, grad = draw(C=129)
    first, again = [
        (backend.reseed(seed), *both_ways(predict, inputs, grad, grid_size=(5, 8)))[1:] for seed in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_a_part_is_of_several_maps_and_no_part_is_without_a_window():
    hidden = torch.empty(3, 64, 128, 512)
    assert on_cuda._parts(hidden, 64 * 8) == 1  # of 12 blocks at once on the emulated device
    assert on_cuda._parts(hidden[..., :128], 64 * 8) == 4
    assert on_cuda._parts(hidden[..., :128], 2) == 2
    assert on_cuda._parts(hidden[..., :128], 0) == 0


def test_second_derivative_is_refused(backend):
    inputs, _ = draw()
    leaves = [x.detach().requires_grad_() for x in inputs]
    with pytest.raises(RuntimeError, match="predict_offsets is not differentiable twice"):
        torch.autograd.grad(predict(*leaves, grid_size=(5, 8)).sum(), leaves, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(2, 40, 6)}, r"hidden must be \(M, B, H \* W, C\), got shape"),
        ({"grid_size": (8, 10)}, r"grid_size must multiply to the number of tokens \(40\), got \(8, 10\)"),
        ({"bias": torch.randn(6)}, r"bias must be \(M, C\), got shape \(6,\)"),
        ({"bias": torch.randn(3, 6)}, r"bias must be \(2, 6\) torch.float32 on cpu .*, got shape \(3, 6\)"),
        ({"window": torch.randn(2, 6, 3, 3)}, r"window must be \(2, 6, 4, 4\)"),
        ({"window_bias": torch.randn(2, 5)}, r"window_bias must be \(2, 6\)"),
        ({"out": torch.randn(2, 6).half()}, r"out must be \(2, 6\) torch.float32 .*, got shape .* torch.float16"),
    ],
)
def test_bad_input_is_named(change, message):
    (hidden, *parameters), _ = draw()
    arguments = {"hidden": hidden, "grid_size": (5, 8)}
    arguments |= dict(zip(("bias", "window", "window_bias", "out"), parameters, strict=True))
    with pytest.raises(ValueError, match=message):
        ops.predict_offsets(**arguments | change)

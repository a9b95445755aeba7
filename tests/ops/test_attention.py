"""Attention equals its formula and differentiates it, and PyTorch's own kernel serves where it is the fastest."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from signal_reid import ops
from signal_reid.ops.reference import attention as oracle

OPERATOR = "attention"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def formula(projected):
    """As the qkv of a transformer's block lies: (B, L, 3, heads, d)."""
    q, k, v = projected.permute(2, 0, 3, 1, 4).unbind(0)
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def attend(projected):
    return ops.attend(projected.permute(2, 0, 3, 1, 4))


def test_is_as_close_as_plain_pytorch_at_any_size(backend, assert_as_close_as_plain):
    def check(B, L, heads, d, dtype):
        inputs, grad = torch.randn(B, L, 3, heads, d).to(dtype), torch.randn(B, heads, L, d).to(dtype)
        assert_as_close_as_plain(attend, formula, [inputs], grad)

    backend.for_all(
        check,
        B=st.integers(0, 2),
        L=st.sampled_from([1, 5, 127, 129]),
        heads=st.integers(1, 3),
        d=st.sampled_from([1, 5, 64]),
        dtype=st.sampled_from(DTYPES),
    )


def test_in_fp64_the_oracle_is_pytorchs_own(assert_as_close_as_plain):
    qkv, grad = torch.randn(3, 2, 3, 7, 5, dtype=torch.float64), torch.randn(2, 3, 7, 5, dtype=torch.float64)
    leaf = qkv.clone().requires_grad_()
    expected = F.scaled_dot_product_attention(*leaf.unbind(0))
    attended, p = oracle.forward(qkv)
    assert torch.allclose(attended, expected, rtol=1e-12)
    assert torch.allclose(oracle.backward(grad, qkv, p), *torch.autograd.grad(expected, leaf, grad), rtol=1e-10)


def test_gradcheck(backend):
    assert gradcheck(ops.attend, torch.randn(3, 2, 2, 4, 3, dtype=torch.float64, requires_grad=True))


STRIDED = {
    "contiguous": lambda x: x.contiguous(),
    "every other": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 2, -1, -1, -1),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_any_strides_of_inputs_and_gradients(backend, view):
    qkv, grad = view(torch.randn(3, 2, 3, 5, 4)), torch.randn(2, 3, 4, 5).mT
    leaf = qkv.detach().requires_grad_()
    (got,) = torch.autograd.grad(ops.attend(leaf), leaf, grad)
    (expected,) = torch.autograd.grad(F.scaled_dot_product_attention(*leaf.unbind(0)), leaf, grad)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_a_number_stays_in_its_head(backend):
    qkv = torch.randn(3, 2, 3, 5, 4)
    qkv[0, 1, 2, 3, 0] = torch.nan
    leaf = qkv.requires_grad_()
    attended = ops.attend(leaf)
    (grad,) = torch.autograd.grad(attended.sum(), leaf)
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 2] = False
    assert attended[1, 2, 3].isnan().all()
    assert attended[others].isfinite().all()
    assert grad[:, others].isfinite().all()
    assert grad[1, 1, 2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_makes_it_multiply_in_its_precision(backend, dtype):
    leaf, grad = torch.randn(3, 2, 3, 5, 4, requires_grad=True), torch.randn(2, 3, 5, 4).to(dtype)
    with torch.autocast("cpu", dtype):
        attended = ops.attend(leaf)
    expected = ops.attend(leaf.to(dtype))
    assert attended.dtype == dtype
    assert torch.equal(attended, expected)
    got, wanted = (torch.autograd.grad(y, leaf, grad)[0] for y in (attended, expected))
    assert torch.equal(got, wanted)


def test_without_a_gradient_on_a_cpu_pytorchs_own_kernel_serves(monkeypatch):
    qkv = torch.randn(3, 2, 3, 5, 4, requires_grad=True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: "PyTorch's")
    assert ops.attend(qkv.detach()) == "PyTorch's"
    with torch.no_grad():
        assert ops.attend(qkv) == "PyTorch's"
    assert torch.is_tensor(ops.attend(qkv))
    with ops.use_backend("reference"):
        assert torch.is_tensor(ops.attend(qkv.detach()))


@pytest.mark.parametrize(
    ("qkv", "message"),
    [
        (torch.randn(2, 1, 2, 3, 4), r"qkv must be \(3, B, heads, L, d\) .* got shape \(2, 1, 2, 3, 4\)"),
        (torch.randn(3, 1, 2, 0, 4), "with L and d at least 1"),
        (torch.randn(3, 1, 2, 3), r"qkv must be \(3, B, heads, L, d\), got shape"),
        (torch.ones(3, 1, 2, 3, 4, dtype=torch.int64), "qkv must be float32"),
    ],
)
def test_bad_input_is_named(qkv, message):
    with pytest.raises(ValueError, match=message):
        ops.attend(qkv)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_on_a_gpu_the_backward_lays_the_gradient_out_in_one_copy(monkeypatch, device):
    monkeypatch.setattr("signal_reid.ops.attention._left_to_pytorch", lambda qkv: True)
    B, L, heads, d = 2, 7, 3, 8
    x, weight, grad = torch.randn(B * L, 4), torch.randn(3 * heads * d, 4), torch.randn(B, heads, L, d)
    x, weight, grad = (tensor.to(device) for tensor in (x, weight, grad))

    def gradients(attend, count):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        attended = attend(F.linear(*leaves).view(B, L, 3, heads, d))
        with count:
            return torch.autograd.grad(attended, leaves, grad)

    copies = CountingCopies()
    got = gradients(attend, copies)
    wanted = gradients(formula, CountingCopies())
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, wanted, strict=True))
    assert copies.of_elements(3 * B * L * heads * d) == ["cat"]


class CountingCopies(TorchDispatchMode):
    """Notes each operator that copies, with the elements that it writes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if function.overloadpacket.__name__ in ("cat", "stack", "clone", "copy_", "_to_copy"):
            self.seen.append((function.overloadpacket.__name__, result.numel()))
        return result

    def of_elements(self, count):
        return [name for name, elements in self.seen if elements == count]

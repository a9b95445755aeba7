"""The self-attention of a transformer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from signal_reid.ops import dispatch, library  # noqa: F401 - library defines torch.ops.signal_reid
from signal_reid.ops.checks import check_floating, in_transform, needs_gradient, refuse_second_derivative
from signal_reid.ops.layout import as_autocast_multiplies, without_autocast
from signal_reid.ops.reference import attention as reference


def attend(qkv: Tensor) -> Tensor:
    """Multi-head attention, `softmax(q k^T / sqrt(d)) v` per head.

    This is PyTorch's own `scaled_dot_product_attention`, but for two cases: training on a CPU, where a backward that
    keeps the probabilities is faster than that of PyTorch's kernel, and the reference where it was chosen.

    Args:
        qkv: (3, B, heads, L, d), queries, keys and values; fp32, fp16, bf16 or fp64, any strides.

    Returns:
        (B, heads, L, d) of the same dtype; under autocast in the precision of its matrix products.

    Raises:
        ValueError: another shape or dtype.
        BackendError: a backend was chosen that cannot serve.

    Source: Vaswani et al., Attention Is All You Need, equation 1.
    """
    check_floating("qkv", qkv, "(3, B, heads, L, d)", 5)
    if qkv.shape[0] != 3 or 0 in qkv.shape[3:]:
        raise ValueError(f"qkv must be (3, B, heads, L, d) with L and d at least 1, got shape {tuple(qkv.shape)}")
    if in_transform() or (torch.compiler.is_compiling() and _trains_on_a_cpu(qkv)):
        return reference.forward(qkv)[0]
    if torch.compiler.is_compiling():
        q, k, v = qkv.unbind(0)
        return F.scaled_dot_product_attention(q, k, v)
    if _left_to_pytorch(qkv):
        q, k, v = _Unbind.apply(qkv)
        return F.scaled_dot_product_attention(q, k, v)
    qkv = as_autocast_multiplies(qkv)
    with without_autocast(qkv):
        return _Attend.apply(qkv) if needs_gradient(qkv) else torch.ops.signal_reid.attend(qkv)[0]


def _left_to_pytorch(qkv: Tensor) -> bool:
    if qkv.device.type == "cpu" and not _trains_on_a_cpu(qkv):
        return dispatch.current_backend() != "reference"
    return dispatch.left_to_pytorch("attention", qkv)


def _trains_on_a_cpu(qkv: Tensor) -> bool:
    return qkv.device.type == "cpu" and needs_gradient(qkv)


class _Unbind(torch.autograd.Function):
    """`qkv.unbind(0)`, whose backward lays the three gradients where a product that makes qkv wants them, in one copy.

    PyTorch's own stacks them, and that product's backward copies the stack: 4.7 of 43 ms of a ViT-B/16 step in bf16 on
    an H100, where one copy takes a fifth of that, by the bytes. Inductor fuses the two.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.unbind(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        _, heads, _, d = grads[0].shape
        rows = torch.cat([grad.transpose(1, 2).flatten(2) for grad in grads], dim=2)  # (B, L, 3 heads d)
        return rows.unflatten(2, (3, heads, d)).permute(2, 0, 3, 1, 4)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        qkv = qkv.contiguous()  # once for both ways
        attended, p = torch.ops.signal_reid.attend(qkv)
        ctx.save_for_backward(qkv, p)
        return attended

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        refuse_second_derivative("attend", grad)
        return torch.ops.signal_reid.attend_backward(grad, *ctx.saved_tensors)

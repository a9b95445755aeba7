"""The offset head of deformable sampling, from its first activation on."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from signal_reid.ops import dispatch, library  # noqa: F401 - library defines torch.ops.signal_reid
from signal_reid.ops.checks import (
    check_floating,
    check_grid,
    check_tensor,
    formula_wanted,
    needs_gradient,
    refuse_second_derivative,
)
from signal_reid.ops.layout import as_autocast_promotes, without_autocast
from signal_reid.ops.reference.offset_head import SIDE
from signal_reid.ops.window_convolution import convolve_windows


def predict_offsets(
    hidden: Tensor, grid_size: tuple[int, int], bias: Tensor, window: Tensor, window_bias: Tensor, out: Tensor
) -> Tensor:
    """One offset per window of 4 x 4 tokens, by a head of each modality's own.

    Bias, GELU (by erf), depthwise 4 x 4 convolution of stride 4 without padding, bias, GELU, projection to one channel:
    `o = sum_c out_c gelu(window_bias_c + sum_t window_ct gelu(hidden_tc + bias_c))`. The kernels take it in one launch
    forward and two backward, compute in fp32 and store no activation. Under torch.compile, and where no kernel of ours
    serves and the reference was not chosen, this is `convolve_windows` between PyTorch's operators.

    Args:
        hidden: (M, B, H * W, C), a product with the tokens of each modality, row by row; fp32, fp16, bf16 or fp64, any
            strides but a unit last one.
        grid_size: (H, W); rows and columns beyond the last whole window take no part.
        bias: (M, C), of the layer whose product is `hidden`; of any of these dtypes.
        window: (M, C, 4, 4) of the bias's dtype; under autocast dtypes may differ, and the widest serves.
        window_bias: (M, C), likewise.
        out: (M, C), likewise.

    Returns:
        (M, B, H // 4, W // 4) of the hidden tokens' dtype.

    Raises:
        ValueError: a shape, dtype or device outside of these.
        BackendError: a backend was chosen that cannot serve.

    Source: Signal (AAAI 2026), local alignment module; Xia et al., Deformable Attention (CVPR 2022).
    """
    parameters = as_autocast_promotes(bias, window, window_bias, out)
    _check(hidden, grid_size, *parameters)
    with without_autocast(hidden):
        if formula_wanted() or dispatch.left_to_pytorch("offset_head", hidden):
            return _by_pytorch(hidden, grid_size, *parameters)
        if needs_gradient(hidden, *parameters):
            return _PredictOffsets.apply(hidden, *parameters, *grid_size)
        return torch.ops.signal_reid.offset_head(hidden, *parameters, *grid_size)


def _by_pytorch(
    hidden: Tensor, grid_size: tuple[int, int], bias: Tensor, window: Tensor, window_bias: Tensor, out: Tensor
) -> Tensor:
    """Modality by modality, as small temporaries cost a CPU less than large ones."""
    bias, window = bias.to(hidden.dtype), window.to(hidden.dtype)
    wide = torch.promote_types(hidden.dtype, out.dtype)  # behind the windows there is little left
    window_bias, out = window_bias.to(wide), out.to(wide)
    offsets = []
    for m, x in enumerate(hidden.unbind()):
        windows = convolve_windows(F.gelu(x + bias[m]).unflatten(1, grid_size), window[m])  # (B, Hk, Wk, C)
        offsets.append(F.gelu(windows + window_bias[m]) @ out[m])
    return torch.stack(offsets).to(hidden.dtype)


def _check(
    hidden: Tensor, grid_size: tuple[int, int], bias: Tensor, window: Tensor, window_bias: Tensor, out: Tensor
) -> None:
    check_floating("hidden", hidden, "(M, B, H * W, C)", 4)
    M, _, N, C = hidden.shape
    check_grid(grid_size, N, least=0)
    check_floating("bias", bias, "(M, C)", 2)
    shapes = {"bias": (M, C), "window": (M, C, SIDE, SIDE), "window_bias": (M, C), "out": (M, C)}
    for (name, shape), tensor in zip(shapes.items(), (bias, window, window_bias, out), strict=True):
        check_tensor(name, tensor)
        if tensor.shape != shape or tensor.dtype != bias.dtype or tensor.device != hidden.device:
            raise ValueError(
                f"{name} must be {shape} {bias.dtype} on {hidden.device} to go with hidden and bias, "
                f"got shape {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )


class _PredictOffsets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *arguments: Any) -> Tensor:
        *parameters, rows, columns = arguments
        ctx.save_for_backward(hidden, *parameters)
        ctx.grid_size = rows, columns
        return torch.ops.signal_reid.offset_head(hidden, *arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("predict_offsets", grad)
        return *torch.ops.signal_reid.offset_head_backward(grad, *ctx.saved_tensors, *ctx.grid_size), None, None

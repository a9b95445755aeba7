r"""The offset head from its product on, in plain PyTorch.

With h the hidden tokens and g GELU, g(x) = x Phi(x), one modality's window of 4 x 4 tokens gives

    u_c = e_c + sum_t w_ct g(h_tc + b_c),    o = sum_c v_c g(u_c).

Backward, with g'(x) = Phi(x) + x phi(x), phi the density, and sums over windows where a parameter is meant:

    dv_c = sum do g(u_c),    du_c = do v_c g'(u_c),    de_c = sum du_c,
    dw_ct = sum du_c g(h_tc + b_c),    dh_tc = du_c w_ct g'(h_tc + b_c),    db_c = sum_t dh_tc.

Tokens beyond the last whole window have no gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 4


def forward(
    hidden: Tensor, bias: Tensor, window: Tensor, window_bias: Tensor, out: Tensor, rows: int, columns: int
) -> Tensor:
    """(M, B, rows * columns, C), parameters -> (M, B, rows // 4, columns // 4); see `ops.predict_offsets`."""
    _, u = _activations(hidden, bias, window, window_bias, rows, columns)
    return (F.gelu(u) * _spread(out, u)).sum(-1).to(hidden.dtype)


def backward(
    grad: Tensor,
    hidden: Tensor,
    bias: Tensor,
    window: Tensor,
    window_bias: Tensor,
    out: Tensor,
    rows: int,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the hidden tokens, bias, window, window bias and projection, given `grad` (M, B, Hk, Wk)."""
    x, u = _activations(hidden, bias, window, window_bias, rows, columns)
    grad = grad.to(u.dtype).unsqueeze(-1)
    du = grad * _spread(out, u) * _slope(u)  # (M, B, Hk, Wk, C)
    spread = du[:, :, :, None, :, None]  # (M, B, Hk, 1, Wk, 1, C)
    dx = spread * _entries(window, u) * _slope(x)  # (M, B, Hk, 4, Wk, 4, C)
    of_window = (spread * F.gelu(x)).sum((1, 2, 4)).permute(0, 3, 1, 2)  # (M, C, 4, 4)
    covered = dx.flatten(4, 5).flatten(2, 3)
    beyond = (0, 0, 0, columns - covered.shape[3], 0, rows - covered.shape[2])
    grad_hidden = F.pad(covered, beyond).flatten(2, 3)
    sums = dx.sum((1, 2, 3, 4, 5)), of_window, du.sum((1, 2, 3)), (grad * F.gelu(u)).sum((1, 2, 3))
    of_parameters = (x.to(p.dtype).contiguous() for x, p in zip(sums, (bias, window, window_bias, out), strict=True))
    of_bias, of_window, of_window_bias, of_out = of_parameters
    return grad_hidden.to(hidden.dtype), of_bias, of_window, of_window_bias, of_out


def _activations(
    hidden: Tensor, bias: Tensor, window: Tensor, window_bias: Tensor, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    """What each GELU is taken of: (M, B, Hk, 4, Wk, 4, C) and (M, B, Hk, Wk, C), in fp32 or wider."""
    wide = torch.promote_types(torch.promote_types(hidden.dtype, bias.dtype), torch.float32)
    Hk, Wk = rows // SIDE, columns // SIDE
    tokens = hidden.to(wide).unflatten(2, (rows, columns))[:, :, : Hk * SIDE, : Wk * SIDE]
    windows = tokens.unflatten(3, (Wk, SIDE)).unflatten(2, (Hk, SIDE))
    x = windows + _spread(bias, windows)
    u = (F.gelu(x) * _entries(window, x)).sum((3, 5))
    return x, u + _spread(window_bias, u)


def _spread(parameter: Tensor, like: Tensor) -> Tensor:
    """(M, C) as it lies over (M, ..., C), in that dtype."""
    return parameter.to(like.dtype).view(parameter.shape[0], *[1] * (like.ndim - 2), parameter.shape[1])


def _entries(window: Tensor, like: Tensor) -> Tensor:
    """(M, C, 4, 4) as it lies over the windows, (M, 1, 1, 4, 1, 4, C)."""
    return window.to(like.dtype).permute(0, 2, 3, 1)[:, None, None, :, None]


def _slope(x: Tensor) -> Tensor:
    """The derivative of GELU."""
    density = torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
    return torch.special.ndtr(x) + x * density

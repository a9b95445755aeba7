"""Floating-point operations of our operators, for PyTorch's counter, which sees nothing inside them.

    with FlopCounterMode(custom_mapping=FORMULAS) as counter: ...

As there, an operation is a multiplication or an addition of a matrix product or a convolution; everything element by
element is left out, and with it every operator of ours that is not listed. Counted is what the operator computes:
attention over masked tokens counts every token, kept or not, though the kernels skip what was dropped, and a backward
counts the products that the gradient needs, not those that a kernel repeats to save memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from signal_reid.ops import library  # noqa: F401 - defines torch.ops.signal_reid

Shape = Sequence[int]


def _select_tokens(tokens: Shape, *_: Any, **__: Any) -> int:
    B, M, N, C = tokens
    return 2 * B * M * (1 + M) * N * C  # each token meets its own class token's query and that of every modality


def _volume(anchor: Shape, others: Sequence[Shape], *_: Any, **__: Any) -> int:
    return 2 * len(others) * anchor[0] * others[0][0] * anchor[1]


def _volume_backward(grad: Shape, anchor: Shape, others: Sequence[Shape], *_: Any, **__: Any) -> int:
    return 3 * _volume(anchor, others)  # of the projections, which are computed anew, of the anchor, of the others


def _loss(features: Shape, *_: Any, **__: Any) -> int:
    B, M, C = features
    return _volume((B, C), [(B, C)] * (M - 1))


def _loss_backward(features: Shape, *_: Any, **__: Any) -> int:
    return 4 * _loss(features)  # the volumes anew, and their gradient


def _attend(qkv: Shape, *_: Any, **__: Any) -> int:
    _three, B, h, L, d = qkv
    return 4 * B * h * L * L * d


def _attend_backward(grad: Shape, qkv: Shape, *_: Any, **__: Any) -> int:
    return 2 * _attend(qkv)


def _attend_masked(queries: Shape, tokens: Shape, *_: Any, **__: Any) -> int:
    B, M, N, C = tokens
    return 4 * B * queries[1] * M * N * C


def _attend_masked_backward(grad: Shape, queries: Shape, tokens: Shape, *_: Any, **__: Any) -> int:
    return 2 * _attend_masked(queries, tokens)


def _cross_attend(queries: Shape, tokens: Shape, mask: Shape, weight: Shape, bias: Shape, heads: int, **__: Any) -> int:
    (B, L, C), (_, M, N, _) = queries, tokens
    return 2 * B * L * C * C * 3 + 4 * B * heads * L * M * N * C  # no token is projected, in any backend but the oracle


def _cross_attend_backward(grad: Shape, *arguments: Any, **__: Any) -> int:
    return 2 * _cross_attend(*arguments[:6])


def _convolve_windows(x: Shape, window: Shape, *_: Any, **__: Any) -> int:
    C, k = window[0], window[1]
    return 2 * x[0] * (x[1] // k) * (x[2] // k) * C * k * k


def _convolve_windows_backward(grad: Shape, x: Shape, window: Shape, *_: Any, **__: Any) -> int:
    return 2 * _convolve_windows(x, window)


def _offset_head(hidden: Shape, *arguments: Any, **__: Any) -> int:
    (M, B, _, C), (rows, columns) = hidden, arguments[4:6]
    return 2 * M * B * (rows // 4) * (columns // 4) * C * (4 * 4 + 1)  # the depthwise window, then the projection


def _offset_head_backward(grad: Shape, hidden: Shape, *arguments: Any, **__: Any) -> int:
    return 2 * _offset_head(hidden, *arguments)


def _pytorchs_attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    B, h, L, d = query
    return 2 * B * h * L * key[2] * (d + value[3])


FORMULAS: Mapping[Any, Callable[..., int]] = {
    torch.ops.signal_reid.select_tokens: _select_tokens,
    torch.ops.signal_reid.gramian_volume: _volume,
    torch.ops.signal_reid.gramian_volume_backward: _volume_backward,
    torch.ops.signal_reid.gramian_loss: _loss,
    torch.ops.signal_reid.gramian_loss_backward: _loss_backward,
    torch.ops.signal_reid.attend: _attend,
    torch.ops.signal_reid.attend_backward: _attend_backward,
    torch.ops.signal_reid.attend_masked: _attend_masked,
    torch.ops.signal_reid.attend_masked_backward: _attend_masked_backward,
    torch.ops.signal_reid.cross_attend: _cross_attend,
    torch.ops.signal_reid.cross_attend_backward: _cross_attend_backward,
    torch.ops.signal_reid.convolve_windows: _convolve_windows,
    torch.ops.signal_reid.convolve_windows_backward: _convolve_windows_backward,
    torch.ops.signal_reid.offset_head: _offset_head,
    torch.ops.signal_reid.offset_head_backward: _offset_head_backward,
    # PyTorch counts its fused attention on a GPU, but not on a CPU (true of 2.13).
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _pytorchs_attention,
}
"""From an operator to its number of operations, given the shapes of its arguments."""


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter that knows our operators; a context, then ask its `get_total_flops()`."""
    return FlopCounterMode(display=False, custom_mapping=dict(FORMULAS))

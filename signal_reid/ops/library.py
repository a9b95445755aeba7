"""Every operator's schema, fake kernel and entry on one page, so that torch.compile and torch.export know them.

Gradients are carried by plain `autograd.Function`s outside these definitions: registering them here would cost more
time per call than the kernels take.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from signal_reid.ops import dispatch

_library = torch.library.Library("signal_reid", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)

ENTRIES: dict[str, Callable[..., Any]] = {}
"""What each operator of `torch.ops.signal_reid` runs, by its name, for those who look inside."""


def _define(schema: str, fake: Callable[..., Any], run: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    ENTRIES[name] = run
    _library.define(schema, tags=_TAGS)
    torch.library.register_fake(f"signal_reid::{name}", fake, lib=_library)
    _library.impl(name, run, "CompositeExplicitAutograd")  # one entry for every device: dispatch looks at the tensor


def _run(op: str, function: str) -> Callable[..., Any]:
    """Call `function` of operator file `op` in the backend that serves the first tensor."""
    return partial(dispatch.call, op, function)


_define(
    "select_tokens(Tensor tokens, Tensor intra_query, Tensor inter_query, int k_intra, int k_inter) -> Tensor",
    lambda tokens, *_: tokens.new_empty(tokens.shape[:3], dtype=torch.bool),
    _run("token_selection", "select_tokens"),
)
_define(
    "gramian_volume(Tensor anchor, Tensor[] others) -> Tensor",
    lambda anchor, others: anchor.new_empty(anchor.shape[0], others[0].shape[0]),
    _run("gramian", "forward"),
)
_define(
    "gramian_volume_backward(Tensor grad, Tensor anchor, Tensor[] others) -> Tensor[]",
    lambda grad, anchor, others: [x.new_empty(x.shape) for x in (anchor, *others)],
    _run("gramian", "backward"),
)
_define(
    "gramian_loss(Tensor features, Tensor temperature, float label_smoothing) -> (Tensor, Tensor, Tensor)",
    lambda features, *_: (features.new_empty(()), features.new_empty(()), features.new_empty(4, features.shape[0])),
    _run("gramian_loss", "forward"),
)
_define(
    "gramian_loss_backward(Tensor features, Tensor grad, Tensor temperature, Tensor slope, Tensor statistics,"
    " float label_smoothing) -> (Tensor, Tensor)",
    lambda features, grad, *_: (features.new_empty(features.shape), grad.new_empty(())),
    _run("gramian_loss", "backward"),
)
_define(
    "deformable_sample(Tensor tokens, Tensor offsets, int rows, int columns, float offset_range) -> Tensor",
    lambda tokens, offsets, *_: tokens.new_empty(tokens.shape[0], offsets.shape[1] * offsets.shape[2], tokens.shape[2]),
    _run("deformable_sampling", "forward"),
)
_define(
    "deformable_sample_backward(Tensor grad, Tensor tokens, Tensor offsets, int rows, int columns, float offset_range)"
    " -> (Tensor, Tensor)",
    lambda grad, tokens, offsets, *_: (tokens.new_empty(tokens.shape), offsets.new_empty(offsets.shape)),
    _run("deformable_sampling", "backward"),
)
_define(
    "offset_head(Tensor hidden, Tensor bias, Tensor window, Tensor window_bias, Tensor out, int rows, int columns)"
    " -> Tensor",
    lambda hidden, bias, window, window_bias, out, rows, columns: hidden.new_empty(
        *hidden.shape[:2], rows // window.shape[2], columns // window.shape[3]
    ),
    _run("offset_head", "forward"),
)
_define(
    "offset_head_backward(Tensor grad, Tensor hidden, Tensor bias, Tensor window, Tensor window_bias, Tensor out,"
    " int rows, int columns) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda grad, *tensors: tuple(x.new_empty(x.shape) for x in tensors[:5]),
    _run("offset_head", "backward"),
)
_define(
    "pairwise_error(Tensor maps) -> Tensor",
    lambda maps: maps.new_empty((), dtype=torch.promote_types(maps.dtype, torch.float32)),
    _run("pairwise_error", "forward"),
)
_define(
    "pairwise_error_backward(Tensor maps, Tensor grad) -> Tensor",
    lambda maps, grad: maps.new_empty(maps.shape),
    _run("pairwise_error", "backward"),
)
_define(
    "quick_gelu(Tensor x) -> Tensor",
    lambda x: torch.empty_like(x),
    _run("activation", "forward"),
)
_define(
    "quick_gelu_backward(Tensor grad, Tensor x) -> Tensor",
    lambda grad, x: torch.empty_like(x),
    _run("activation", "backward"),
)
_define(
    "add_layer_norm(Tensor x, Tensor branch, Tensor weight, Tensor bias, float eps, ScalarType out_dtype)"
    " -> (Tensor, Tensor)",
    lambda x, branch, weight, bias, eps, dtype: (
        x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype)),
        x.new_empty(x.shape, dtype=dtype),
    ),
    _run("residual_norm", "forward"),
)
_define(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType out_dtype) -> Tensor",
    lambda x, weight, bias, eps, dtype: x.new_empty(x.shape, dtype=dtype),
    lambda x, *arguments: dispatch.call("residual_norm", "forward", x, None, *arguments)[1],
)
_define(
    "add_layer_norm_backward(Tensor grad_normed, Tensor? grad_total, Tensor total, Tensor weight, float eps,"
    " ScalarType? branch_dtype) -> Tensor[]",
    lambda grad_normed, grad_total, total, weight, eps, branch_dtype: [
        total.new_empty(total.shape),
        weight.new_empty(2, *weight.shape),
        *([] if branch_dtype is None else [total.new_empty(total.shape, dtype=branch_dtype)]),
    ],
    _run("residual_norm", "backward"),
)
_define(
    "attend(Tensor qkv) -> (Tensor, Tensor)",
    lambda qkv: (qkv.new_empty(qkv.shape[1:]), qkv.new_empty(*qkv.shape[1:4], qkv.shape[3])),
    _run("attention", "forward"),
)
_define(
    "attend_backward(Tensor grad, Tensor qkv, Tensor p) -> Tensor",
    lambda grad, qkv, p: qkv.new_empty(qkv.shape),
    _run("attention", "backward"),
)
_define(
    "mean_tokens(Tensor tokens) -> Tensor",
    lambda tokens: tokens.new_empty(
        *tokens.shape[:2], tokens.shape[3], dtype=torch.promote_types(tokens.dtype, torch.float32)
    ),
    _run("token_mean", "forward"),
)
_define(
    "attend_masked(Tensor queries, Tensor tokens, Tensor mask) -> (Tensor, Tensor[])",
    lambda queries, *arguments: (
        queries.new_empty(queries.shape),
        _run("masked_attention", "to_keep")(queries, *arguments),  # each backend keeps what its own backward wants
    ),
    _run("masked_attention", "forward"),
)
_define(
    "attend_masked_backward(Tensor grad, Tensor queries, Tensor tokens, Tensor mask, Tensor attended, Tensor[] kept)"
    " -> (Tensor, Tensor)",
    lambda grad, queries, tokens, *_: (queries.new_empty(queries.shape), queries.new_empty(tokens.shape)),
    _run("masked_attention", "backward"),
)
_define(
    "cross_attend(Tensor queries, Tensor tokens, Tensor mask, Tensor weight, Tensor bias, int heads)"
    " -> (Tensor, Tensor[])",
    lambda queries, *arguments: (
        queries.new_empty(queries.shape),
        _run("cross_attention", "to_keep")(queries, *arguments),
    ),
    _run("cross_attention", "forward"),
)
_define(
    "cross_attend_backward(Tensor grad, Tensor queries, Tensor tokens, Tensor mask, Tensor weight, Tensor bias,"
    " int heads, Tensor[] kept) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, queries, tokens, mask, weight, bias, *_: (
        queries.new_empty(queries.shape),
        queries.new_empty(tokens.shape),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
    ),
    _run("cross_attention", "backward"),
)
_define(
    "convolve_windows(Tensor x, Tensor window) -> Tensor",
    lambda x, window: x.new_empty(x.shape[0], *(n // window.shape[1] for n in x.shape[1:3]), x.shape[3]),
    _run("window_convolution", "forward"),
)
_define(
    "convolve_windows_backward(Tensor grad, Tensor x, Tensor window) -> (Tensor, Tensor)",
    lambda grad, x, window: (x.new_empty(x.shape), window.new_empty(window.shape)),
    _run("window_convolution", "backward"),
)
_define("sort_rows(Tensor(a!) values) -> ()", lambda values: None, _run("sorting", "sort_rows"))

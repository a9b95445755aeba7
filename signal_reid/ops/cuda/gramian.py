"""Pairwise gramian volume by the native core: one launch forward, two backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from signal_reid.ops.cuda import core


def forward(anchor: Tensor, others: Sequence[Tensor]) -> Tensor:
    """(P, C) and k times (Q, C), fp32 -> (P, Q)."""
    anchor, *others = (vectors.contiguous() for vectors in (anchor, *others))
    P, Q, C = anchor.shape[0], others[0].shape[0], anchor.shape[1]
    volume = torch.empty((P, Q), dtype=anchor.dtype, device=anchor.device)
    core.launch("gramian_volume", anchor, anchor.data_ptr(), _addresses(others), volume.data_ptr(), P, Q, C)
    return volume


def backward(grad: Tensor, anchor: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the anchor and of each other vector, given `grad` (P, Q)."""
    grad, anchor, *others = (tensor.contiguous() for tensor in (grad, anchor, *others))
    P, Q, C = anchor.shape[0], others[0].shape[0], anchor.shape[1]
    size = core.native().gramian_volume_workspace(P, Q, C, len(others))
    workspace = torch.empty(size, dtype=anchor.dtype, device=anchor.device)
    gradients = [torch.empty_like(vectors) for vectors in (anchor, *others)]
    core.launch(
        "gramian_volume_backward",
        anchor,
        grad.data_ptr(),
        anchor.data_ptr(),
        _addresses(others),
        gradients[0].data_ptr(),
        _addresses(gradients[1:]),
        workspace.data_ptr(),
        P,
        Q,
        C,
    )
    return tuple(gradients)


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)

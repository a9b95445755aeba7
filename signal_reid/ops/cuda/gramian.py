"""Pairwise gramian volume by the native core: one launch forward, two backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from signal_reid.ops.cuda import core
from signal_reid.ops.dispatch import BackendError

ROWS_PER_BLOCK, CHANNELS_PER_BLOCK = 256, 128  # where there are many of both; as in csrc/gramian*.cu


def forward(anchor: Tensor, others: Sequence[Tensor]) -> Tensor:
    """(P, C) and k times (Q, C), fp32 -> (P, Q).

    Raises:
        BackendError: more pairs than a launch has blocks for, from 2^31 columns on.
    """
    _check(anchor, others[0])
    anchor, *others = (vectors.contiguous() for vectors in (anchor, *others))
    P, Q, C = anchor.shape[0], others[0].shape[0], anchor.shape[1]
    volume = torch.empty((P, Q), dtype=anchor.dtype, device=anchor.device)
    fields = {
        "anchor": anchor.data_ptr(),
        "others": _addresses(others),
        "volume": volume.data_ptr(),
        "P": P,
        "Q": Q,
        "C": C,
    }
    core.launch("gramian_volume", anchor, fields)
    return volume


def backward(grad: Tensor, anchor: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the anchor and of each other vector, given `grad` (P, Q).

    Raises:
        BackendError: as in `forward`.
    """
    _check(anchor, others[0])
    grad, anchor, *others = (tensor.contiguous() for tensor in (grad, anchor, *others))
    P, Q, C = anchor.shape[0], others[0].shape[0], anchor.shape[1]
    size = core.native().gramian_volume_workspace(P=P, Q=Q, C=C, k=len(others))
    workspace = torch.empty(size, dtype=anchor.dtype, device=anchor.device)
    grad_anchor, *grad_others = gradients = [torch.empty_like(vectors) for vectors in (anchor, *others)]
    fields = {
        "grad": grad.data_ptr(),
        "anchor": anchor.data_ptr(),
        "others": _addresses(others),
        "grad_anchor": grad_anchor.data_ptr(),
        "grad_others": _addresses(grad_others),
        "workspace": workspace.data_ptr(),
        "P": P,
        "Q": Q,
        "C": C,
    }
    core.launch("gramian_volume_backward", anchor, fields)
    return tuple(gradients)


def _check(anchor: Tensor, other: Tensor) -> None:
    (P, C), Q = anchor.shape, other.shape[0]
    blocks = max(Q * -(-P // ROWS_PER_BLOCK), (P + Q) * -(-C // CHANNELS_PER_BLOCK))
    if blocks > core.MOST_BLOCKS:
        raise BackendError(
            f"backend cuda cannot pair anchor of shape {tuple(anchor.shape)} with others of shape {tuple(other.shape)}"
            f": they take {blocks} blocks, a launch has at most {core.MOST_BLOCKS}; "
            "divide them or use backend reference"
        )


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)

"""How far several maps of one shape are apart."""

from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from signal_reid.ops import dispatch, library  # noqa: F401 - library defines torch.ops.signal_reid
from signal_reid.ops.checks import check_dtype, check_tensor, formula_wanted, needs_gradient, refuse_second_derivative
from signal_reid.ops.layout import without_autocast


def pairwise_mse_loss(maps: Tensor) -> Tensor:
    """Mean over all pairs of maps of their mean squared difference, computed in fp32 (fp64 for fp64 input).

    The kernels read the maps once in each direction. Under torch.compile, and where no kernel of ours serves and the
    reference was not chosen, this is `torch.nn.functional.mse_loss` of every pair.

    Args:
        maps: (M, ...), M at least 2; fp32, fp16, bf16 or fp64, any strides.

    Returns:
        () fp32 (fp64 for fp64 input); NaN for maps without numbers, as other means.

    Raises:
        ValueError: a shape or dtype outside of these.
        BackendError: a backend was chosen that cannot serve.

    Source: Signal (AAAI 2026), loss of the local alignment module.
    """
    check_tensor("maps", maps)
    if maps.ndim == 0 or len(maps) < 2:
        raise ValueError(f"maps must hold at least 2 maps (M, ...), got shape {tuple(maps.shape)}")
    check_dtype("maps", maps.dtype)
    with without_autocast(maps):
        if formula_wanted() or dispatch.left_to_pytorch("pairwise_error", maps):
            return _by_pytorch(maps)
        if needs_gradient(maps):
            return _PairwiseError.apply(maps)
        return torch.ops.signal_reid.pairwise_error(maps)


def _by_pytorch(maps: Tensor) -> Tensor:
    wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return torch.stack([F.mse_loss(a, b) for a, b in combinations(wide.unbind(), 2)]).mean()


class _PairwiseError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        ctx.save_for_backward(maps)
        return torch.ops.signal_reid.pairwise_error(maps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        refuse_second_derivative("pairwise_mse_loss", grad)
        return torch.ops.signal_reid.pairwise_error_backward(*ctx.saved_tensors, grad)

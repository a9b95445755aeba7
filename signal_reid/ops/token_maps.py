"""The tokens of a batch, modality by modality."""

import torch
from torch import Tensor

from signal_reid.ops import dispatch
from signal_reid.ops.checks import check_floating


def split_modalities(tokens: Tensor) -> tuple[Tensor, ...]:
    """The tokens of each modality by themselves, laid out as the device multiplies them fastest.

    On a CPU these are contiguous copies, elsewhere views; both are differentiated by PyTorch.

    Args:
        tokens: (B, M, N, C), fp32, fp16, bf16 or fp64, any strides.

    Returns:
        M tensors (B, N, C).

    Raises:
        ValueError: another shape or dtype.
        BackendError: a backend was chosen that cannot serve.
    """
    check_floating("tokens", tokens, "(B, M, N, C)", 4)
    return tokens.unbind(1) if torch.compiler.is_compiling() else dispatch.call("token_maps", "split", tokens)

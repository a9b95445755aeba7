"""The tokens of each modality, as views."""

from torch import Tensor


def split(tokens: Tensor) -> tuple[Tensor, ...]:
    """(B, M, N, C) -> M times (B, N, C)."""
    return tokens.unbind(1)

"""The oracle: every operator in plain PyTorch, on any device, in any floating dtype."""

from torch import Tensor


def unavailable_reason(start: bool = False) -> None:
    """Plain PyTorch is always available."""


def reason_against(tensor: Tensor) -> None:
    """Plain PyTorch takes every tensor."""

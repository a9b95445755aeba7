"""What a CPU runs: results of the reference, written as they are because of how a CPU and its libraries compute.

Written in PyTorch, these run on any device where they are asked for; only sorting needs the host's memory.
"""

from torch import Tensor


def unavailable_reason(start: bool = False) -> None:
    """Every machine has a CPU."""


def reason_against(tensor: Tensor) -> None:
    """PyTorch takes these tensors on any device."""

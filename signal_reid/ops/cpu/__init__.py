"""What a CPU runs: results of the reference, written as they are because of how a CPU and its libraries compute."""

from torch import Tensor


def unavailable_reason() -> None:
    """Every machine has a CPU."""


def reason_against(tensor: Tensor) -> str | None:
    """Why this tensor cannot be served though others can; None when it can."""
    return None if tensor.device.type == "cpu" else "the tensor is not on a CPU"

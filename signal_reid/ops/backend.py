"""What a backend is, and which there are.

A backend is a package `signal_reid.ops.<name>` that offers

    unavailable_reason(start) -> str | None   why no tensor can be served here, in plain words; None when some can
    reason_against(tensor) -> str | None      why this tensor cannot be served; None when it can

and, for each operator that it serves, one module with the name and the functions of `OPERATORS`. Their arguments and
results are those of the reference, which serves every operator; the first argument decides which backend is asked.
A backend need not serve every operator. A function raises BackendError, before it computes anything, when the other
arguments are beyond it, and says in plain words why.

Outputs are contiguous, whatever the strides of the inputs, as `library` tells the compiler, and share no memory with an
input. The exceptions: the results of `activation` lie as `torch.empty_like(x)` does, the sum of `residual_norm` without
a branch is x itself, and `sorting` writes to its input.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Protocol, cast

from torch import Tensor

BACKENDS = ("reference", "cpu", "cuda", "triton")

OPERATORS = {
    "activation": ("forward", "backward"),
    "attention": ("forward", "backward"),
    "cross_attention": ("forward", "to_keep", "backward"),
    "deformable_sampling": ("forward", "backward"),
    "gramian": ("forward", "backward"),
    "gramian_loss": ("forward", "backward"),
    "masked_attention": ("forward", "to_keep", "backward"),
    "offset_head": ("forward", "backward"),
    "pairwise_error": ("forward", "backward"),
    "residual_norm": ("forward", "backward"),
    "sorting": ("sort_rows",),
    "token_mean": ("forward",),
    "token_selection": ("select_tokens",),
    "window_convolution": ("forward", "backward"),
}
"""Every operator's module, and the functions that it must have."""


class Backend(Protocol):
    """What the package of a backend offers beside its modules."""

    def unavailable_reason(self, start: bool = False) -> str | None:
        """Why no tensor can be served here, in plain words; None when some can.

        Args:
            start: whether it may start GPUs to find out, which takes memory on each and makes forking unsafe.
        """

    def reason_against(self, tensor: Tensor) -> str | None:
        """Why this tensor cannot be served, in plain words; None when it can. Only its own GPU is asked."""


def preference(tensor: Tensor) -> tuple[str, ...]:
    """The backends that `auto` tries for a tensor, the fastest first."""
    if tensor.is_cuda:
        return "cuda", "triton", "reference"
    return ("cpu", "reference") if tensor.device.type == "cpu" else ("reference",)


@cache
def package(name: str) -> Backend:
    """The package of a backend."""
    return cast(Backend, importlib.import_module(f"signal_reid.ops.{name}"))


@cache
def serves(name: str, operator: str) -> bool:
    """Whether a backend has a module for an operator of `OPERATORS`."""
    return importlib.util.find_spec(f"signal_reid.ops.{name}.{operator}") is not None

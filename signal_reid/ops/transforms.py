"""What the transforms of torch.func need of an operator that does not show them its formula."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def sample_by_sample(
    function: Callable[..., Any], samples: int, in_dims: Sequence[int | None], arguments: Sequence[Tensor]
) -> tuple[Any, Any]:
    """The rule of `vmap` for a function of tensors: one call for each sample of its batch.

    Args:
        function: gives a tensor or several.
        samples: at least 1.
        in_dims: which dimension of each argument counts the samples; None where all share it.
        arguments: of the function, before the batch is taken apart.

    Returns:
        What the function gives, stacked, and which dimension counts the samples; both as tuples where it gives several.
    """
    results = [
        function(*(x if dim is None else x.select(dim, n) for x, dim in zip(arguments, in_dims, strict=True)))
        for n in range(samples)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(map(torch.stack, zip(*results, strict=True)))
    return stacked, (0,) * len(stacked)

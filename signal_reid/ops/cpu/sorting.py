"""Sorting by NumPy, whose sort of plain numbers has vector instructions: some twenty times as fast as PyTorch's.

It moves no indices along. Where PyTorch sorts values alone as fast, this module can go.
"""

import torch
from torch import Tensor

from signal_reid.ops.dispatch import BackendError
from signal_reid.runtime.threads import map_in_pool

WORTH_THREADS = 2**22  # numbers to sort; below, the threads of the matrix product before it still hold the cores


def sort_rows(values: Tensor) -> None:
    """Sort each row of (m, n) in place, ascending, NaN last.

    Raises:
        BackendError: a dtype that NumPy does not have, or memory that it does not reach.
    """
    if values.device.type != "cpu":
        raise BackendError(f"backend cpu sorts in the host's memory, got a tensor on {values.device}")
    if values.dtype == torch.bfloat16:
        raise BackendError("backend cpu cannot sort bfloat16, which NumPy does not have; use backend reference")
    rows = values.detach().numpy()
    parts = [part.numpy() for part in values.detach().chunk(torch.get_num_threads())]
    if len(parts) == 1 or values.numel() < WORTH_THREADS:
        rows.sort(axis=1)
    else:
        # sorting releases the interpreter lock
        list(map_in_pool(lambda part: part.sort(axis=1), parts, len(parts)))

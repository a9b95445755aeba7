"""Device and precision of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from signal_reid.runtime.distributed import ALONE, Processes
from signal_reid.runtime.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """The dtype of matrix products; parameters, losses and the optimizer stay in fp32."""

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]

    def autocast(self) -> torch.autocast:
        """The context of a forward pass; does nothing in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.name != "fp32")

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss in fp16, where small gradients would vanish; does nothing otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def choose_device(name: str, processes: Processes = ALONE) -> torch.device:
    """`auto` is the first GPU where there is one; anything else is PyTorch's name of a device.

    Of several processes each takes a GPU of its own, the one of its local rank, or all take the CPU.

    Raises:
        ValueError: no such device here, or not one for each process.
    """
    if processes.size > 1:
        name = _own_device(name, processes)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # memory is pinned for, and kernels compiled for, the current one
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"training.device must be auto, cpu or cuda[:N] of this machine, got {name!r} "
            f"({str(error).splitlines()[0]})"
        ) from None
    return device


def _own_device(name: str, processes: Processes) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"training.device must be auto, cpu or cuda for {processes.size} processes, got {name!r}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if processes.local_size > torch.cuda.device_count():
        raise InputError(
            f"each process needs a GPU of its own: {processes.local_size} processes, {torch.cuda.device_count()} GPUs; "
            "start fewer, or choose training.device=cpu"
        )
    return f"cuda:{processes.local_rank}"


def choose_precision(name: str, device: torch.device) -> Precision:
    """`auto` is bf16 on GPUs that compute in it, fp16 on older ones and fp32 on the CPU."""
    if name != "auto":
        return Precision(name, device)
    if device.type != "cuda":
        return Precision("fp32", device)
    return Precision("bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16", device)

"""Device and precision of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one; anything else is PyTorch's name of a device.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # memory is pinned for, and kernels compiled for, the current one
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"training.device must be auto, cpu or cuda[:N] of this machine, got {name!r} "
            f"({str(error).splitlines()[0]})"
        ) from None
    return device


def choose_precision(name: str, device: torch.device) -> Precision:
    """`auto` is bf16 on GPUs that compute in it, fp16 on older ones and fp32 on the CPU."""
    if name != "auto":
        return Precision(name, device)
    if device.type != "cuda":
        return Precision("fp32", device)
    return Precision("bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16", device)

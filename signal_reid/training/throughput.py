"""Operations of a training step and the peak of the device, for model FLOP utilisation (MFU)."""

from __future__ import annotations

import re
import sys
import time

import torch

from signal_reid.methods.base import Method
from signal_reid.runtime.device import Precision

# Dense matrix products with fp32 accumulation, TFLOP/s, from the vendor's data sheets: (fp32 without TF32, 16 bit).
GPU_PEAKS = {
    "H200": (67.0, 989.0),
    "H100 PCIe": (51.0, 756.0),
    "H100": (67.0, 989.0),
    "A100": (19.5, 312.0),
    "A800": (19.5, 312.0),
    "L40S": (91.6, 362.0),
    "L40": (90.5, 181.0),
    "L4": (30.3, 121.0),
    "A40": (37.4, 149.7),
    "A10": (31.2, 125.0),
    "RTX 6000 Ada": (91.1, 364.2),
    "RTX A6000": (38.7, 154.8),
    "RTX 5090": (104.8, 209.5),
    "RTX 4090": (82.6, 165.2),
    "RTX 4080": (48.7, 97.5),
    "RTX 3090 Ti": (40.0, 80.0),
    "RTX 3090": (35.6, 71.0),
    "RTX 3080": (29.8, 59.5),
    "V100": (15.7, 125.0),
    "T4": (8.1, 65.0),
}


def training_flops(model: Method) -> float:
    """Floating-point operations of one sample's forward and backward: three times its matrix products' forward."""
    return 3.0 * model.flops()


def peak_flops(precision: Precision) -> tuple[float, str]:
    """The device's peak in operations per second, and where the number is from.

    A GPU in the table has its vendor's figure; anything else, the CPU too, is measured with large matrix products.
    """
    if precision.device.type == "cuda":
        name = torch.cuda.get_device_name(precision.device)
        for model in sorted(GPU_PEAKS, key=len, reverse=True):
            if re.search(rf"\b{model}\b(?! (?:Ti|SUPER|Laptop|D|NVL)\b)", name):  # those are other cards
                return GPU_PEAKS[model][precision.name != "fp32"] * 1e12, f"peak of {model}"
    return _measured_peak(precision), "measured matrix product"


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` of a GPU begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes: of PyTorch's allocator on a GPU since `reset_peak_memory`, ever resident of this process on a CPU.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _measured_peak(precision: Precision, repeats: int = 5) -> float:
    """The fastest rate of some products of a size at which they reach their best; a CPU in bf16 needs 2048 for it.

    A CPU without fp16 arithmetic takes minutes for that size, and its rate is the same at any: the sizes end where the
    next one would take a fifth of a second.
    """
    sizes = (4096,) if precision.device.type == "cuda" else (128, 512, 2048)
    for size in sizes:
        seconds = _fastest_product(size, precision, repeats)
        if 64 * seconds > 0.2:  # what the next size would take
            break
    return 2 * size**3 / seconds


def _fastest_product(size: int, precision: Precision, repeats: int) -> float:
    """Seconds of the fastest product of two matrices of that size."""
    a, b = (torch.randn(size, size, device=precision.device, dtype=precision.dtype) for _ in range(2))
    product = torch.empty_like(a)
    fastest = float("inf")
    for _ in range(repeats):
        _wait(precision.device)
        start = time.perf_counter()
        torch.mm(a, b, out=product)
        _wait(precision.device)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""What this installation is and can do."""

from __future__ import annotations

import platform

import torch

import signal_reid
from signal_reid.ops import dispatch


def describe() -> dict[str, str]:
    """Versions, devices and operator backends by name, in plain words."""
    facts = {
        "signal-reid": signal_reid.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": f"{torch.get_num_threads()} threads",
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            facts[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        facts["cuda"] = "no GPU that this torch can use"
    for backend in dispatch.BACKENDS:
        reason = dispatch.unavailable_reason(backend)
        facts[f"backend {backend}"] = "available" if reason is None else f"not available: {reason}"
    facts["backend in force"] = dispatch.current_backend()
    return facts

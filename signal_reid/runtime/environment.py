"""What this installation runs on."""

from __future__ import annotations

import platform

import torch

import signal_reid


def describe() -> dict[str, str]:
    """Versions and devices by name, in plain words."""
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
    return facts

"""The native core compiled for the host, in place of the GPU's."""

import ctypes
import os

import pytest
import torch

from signal_reid.ops.cuda import core


@pytest.fixture(scope="module")
def on_emulator(emulated_core):
    """Runs `signal_reid.ops.cuda` on the emulator, outputs starting as NaN or true; gives the schedule's seed."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # PyTorch then fills what torch.empty returns
    with core.use(emulated_core):
        yield ctypes.CDLL(emulated_core.__file__).simt_seed
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def examples():
    """How many examples a property is tried on; few where sanitizers make each of them slow."""
    return int(os.environ.get("SIGNAL_REID_SIMT_EXAMPLES", "40"))

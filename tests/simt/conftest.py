"""The native core compiled for the host, in place of the GPU's."""

import ctypes
import importlib.util
import os
from pathlib import Path

import pytest
import torch

from signal_reid.ops.cuda import core

HERE = Path(__file__).parent


def load_build():
    spec = importlib.util.spec_from_file_location("simt_build", HERE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def simt_build():
    """The module that compiles against the emulator."""
    return load_build()


@pytest.fixture(scope="session")
def emulated_core(simt_build):
    """The native core on host memory; the sanitized build where SIGNAL_REID_SIMT_SANITIZE says so."""
    return simt_build.build_emulated(sanitize=os.environ.get("SIGNAL_REID_SIMT_SANITIZE") == "1")


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

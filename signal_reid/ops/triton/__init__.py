"""The Triton kernels: one file per operator, `launch` has what they share. Triton is imported with the first kernel."""

import importlib
import importlib.util
import os
import re
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

OLDEST = (3, 0)
INTERPRETERS = (((3, 2), (2, 0)), ((3, 7), (2, 4)))
"""The first Triton that interprets with each of these versions of NumPy and newer ones."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Triton decides when a kernel is defined whether it will be interpreted, so the environment is read once.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def unavailable_reason(start: bool = False) -> str | None:
    """Why no tensor can be served here, in plain words; None when the kernels can run. No GPU has to be started."""
    return (None if INTERPRETING else _reason_against_devices()) or _reason_against_package()


def reason_against(tensor: Tensor) -> str | None:
    """Why this tensor cannot be served, in plain words; None when it can."""
    reason = _reason_against_package()
    if reason is not None:
        return reason
    if not tensor.is_cuda and not INTERPRETING:
        return "the tensor is not on a GPU"
    reason = reason_against_device(tensor.get_device()) if tensor.is_cuda else None
    if reason is not None:
        return reason
    if tensor.dtype not in DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {tensor.dtype}"
    return None


@cache
def _reason_against_package() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install triton"
    version = importlib.import_module("triton").__version__
    if _numbers(version) < OLDEST:
        return f"the package triton is {version}, the kernels need {'.'.join(map(str, OLDEST))} or newer"
    for of_triton, of_numpy in INTERPRETERS if INTERPRETING else ():
        if _numbers(version) < of_triton and _numbers(np.__version__) >= of_numpy:
            below = ".".join(map(str, of_numpy))
            return f"triton {version} cannot interpret with numpy {np.__version__}; it needs numpy below {below}"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """The major and the minor number of a version."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


@cache
def _reason_against_devices() -> str | None:
    if not torch.cuda.is_available():
        return "this torch sees no GPU; TRITON_INTERPRET=1 interprets the kernels on the CPU, slowly"
    reasons = [reason_against_device(index) for index in range(torch.cuda.device_count())]
    return reasons[0] if all(reasons) else None


@cache
def reason_against_device(index: int) -> str | None:
    """Why the kernels cannot run on this GPU, in plain words; None when they can."""
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"the kernels need sm_80 or newer, this GPU is sm_{10 * capability[0] + capability[1]}"
    return _reason_against_compiling()


def _reason_against_compiling() -> str | None:
    """Triton compiles a small C program of its own for every kernel."""
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return "Triton needs a C compiler, and there is no cc, gcc or clang here"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Triton needs Python's headers (python3-dev), and there is no Python.h here"
    return None

"""What Triton makes of the kernels for sm_80, 86 and 90: no spills, blocks that fit, accesses of 16 bytes."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / "build" / "triton"  # of compiled kernels, by what went into them
ARCHITECTURES = ("86", "80", "90")  # the first in every dtype and variant

REGISTERS_OF_A_MULTIPROCESSOR = 65_536
LARGEST_SHARED_MEMORY = 99 * 1024  # that every one of them grants a block

# Just above the longest: what is longer compiles longer, about a second for 1,000 of them on a core of 2 GHz.
MOST_INSTRUCTIONS = 1_300

# Read numbers of 4 bytes: a few hundred to a block, in a stride that its lists ask for; rows and columns of volumes.
NARROW = {("token_selection", "_select_kernel"), ("gramian_loss", "_lines_kernel")}


@dataclass
class Kernel:
    """One compiled kernel: where it is from, its settings, and what it takes."""

    module: str
    name: str
    dtype: str
    settings: dict
    architecture: str
    threads: int
    dynamic_shared_bytes: int
    reduces_what_it_loads: bool
    wide_loads: int
    instructions: int
    cubin: str
    usage: dict[str, int]

    def __str__(self):
        return f"{self.module}.{self.name} in {self.dtype} on {self.architecture} with {self.settings}: {self.usage}"


def usage_of(cuobjdump, cubin):
    """REG, STACK, SHARED, LOCAL and so on as the assembler left them; what spills goes to the stack."""
    done = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", done.stdout)}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the program beside this file wrote; it runs apart, where Triton compiles even if it interprets here."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, HERE / "compile_triton.py", folder, *ARCHITECTURES],
        env=environment | {"TRITON_CACHE_DIR": str(CACHE)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "kernels.json").read_text())


@pytest.fixture(scope="module")
def kernels(report, cuobjdump):
    return [Kernel(**facts, usage=usage_of(cuobjdump, facts["cubin"])) for facts in report["compiled"]]


def test_every_kernel_compiles_for_every_architecture(report):
    wanted = {(module, name) for module, names in report["kernels"].items() for name in names}
    for architecture in ARCHITECTURES:
        compiled = {(k["module"], k["name"]) for k in report["compiled"] if k["architecture"] == f"sm_{architecture}"}
        assert compiled == wanted


def test_no_loop_has_a_reduction_that_triton_3_6_cannot_move(report):
    assert report["example"]  # so it would be found
    assert not [(k["name"], k["settings"]) for k in report["compiled"] if k["reduces_what_it_loads"]]


def local_accesses(cuobjdump, cubin):
    """Instructions that read or write local memory; some assemblers leave room there that nothing uses."""
    done = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True)
    return len(re.findall(r"\b(?:LDL|STL)\b", done.stdout))


def test_nothing_spills(kernels, cuobjdump):
    suspected = [k for k in kernels if k.usage["STACK"] or k.usage["LOCAL"]]
    assert not [f"{k}, {n} accesses" for k in suspected if (n := local_accesses(cuobjdump, k.cubin))]


def test_registers_let_a_block_fit_twice(kernels):
    for kernel in kernels:
        assert 2 * kernel.usage["REG"] * kernel.threads <= REGISTERS_OF_A_MULTIPROCESSOR, kernel


def test_shared_memory_fits_any_of_the_devices(kernels):
    for kernel in kernels:
        assert kernel.usage["SHARED"] + kernel.dynamic_shared_bytes <= LARGEST_SHARED_MEMORY, kernel


def test_kernels_stay_as_short_as_they_are(kernels):
    for kernel in kernels:
        assert kernel.instructions <= MOST_INSTRUCTIONS, kernel


def test_streams_are_loaded_16_bytes_at_a_time(kernels):
    for kernel in kernels:
        if (kernel.module, kernel.name) not in NARROW:
            assert kernel.wide_loads > 0, kernel

"""The CUDA sources compiled for real GPUs, and read back: no GPU is needed for that."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")  # that setup.py builds for
DISASSEMBLED = ("sm_86", "sm_90")
SIZES = {"f": 4, "6__half": 2, "13__nv_bfloat16": 2}


@dataclass
class Kernel:
    """One instantiation as the compiler reports it, and the opcodes it consists of."""

    name: str
    arguments: tuple[str, ...]
    architecture: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spilled_bytes: int
    opcodes: Counter[str] | None

    def __str__(self):
        return f"{self.name}<{', '.join(self.arguments)}> on {self.architecture}"

    def moves_16_bytes(self, width_at: int) -> bool:
        """Whether its template asks for packs of 16 bytes; the width is the argument at `width_at`."""
        return int(self.arguments[width_at]) * SIZES.get(self.arguments[0], 4) == 16

    def count(self, opcode: str, wide: bool) -> int:
        """Instructions `opcode`, those of 16 bytes or the narrower ones."""
        assert self.opcodes is not None
        return sum(n for name, n in self.opcodes.items() if name.split(".")[0] == opcode and (".128" in name) == wide)


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [f"{home}/bin/nvcc" for home in homes if home] + [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((path for path in candidates if path and Path(path).is_file()), None)


def find_cuobjdump() -> str | None:
    """CUDA's own, else the one that the package triton brings along."""
    if on_path := shutil.which("cuobjdump"):
        return on_path
    triton = importlib.util.find_spec("triton")
    inside = (
        [Path(p, "backends", "nvidia", "bin", "cuobjdump") for p in (triton.submodule_search_locations or [])]
        if (triton)
        else []
    )
    return next((str(path) for path in inside if path.is_file()), None)


@cache
def demangle(symbol: str) -> tuple[str, tuple[str, ...]]:
    """Name and template arguments of a kernel; types stay as the compiler encodes them."""
    name, rest = "", re.sub("^_ZN?", "", symbol)
    while match := re.match(r"\d+", rest):  # the namespaces, then the kernel, each behind its length
        start, end = match.end(), match.end() + int(match[0])
        name, rest = rest[start:end], rest[end:]
    arguments = re.match("I(.*?)EEv", rest)
    return name, tuple(
        a or b for a, b in re.findall(r"Li(\d+)|(f|6__half|13__nv_bfloat16)", arguments[1] if arguments else "")
    )


def compile_source(nvcc: str, source: Path, target: Path, flags=()) -> str:
    """Write a fat binary for sm_86; return the compiler's report."""
    command = [nvcc, "-std=c++17", "-O3", "-Xptxas=-v", "-arch=sm_86", *flags, "-fatbin", "-o", target, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def read_report(report: str) -> list[Kernel]:
    entries = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n(.*?Used (\d+) registers.*?)\n",
        report,
        flags=re.DOTALL,
    )
    kernels = []
    for symbol, architecture, stack, stores, loads, usage, registers in entries:
        shared = re.search(r"(\d+) bytes smem", usage)
        kernel = Kernel(
            *demangle(symbol),
            architecture,
            int(registers),
            int(shared[1]) if shared else 0,
            int(stack),
            int(stores) + int(loads),
            None,
        )
        kernels.append(kernel)
    return kernels


def read_usage(cuobjdump: str, binary: Path) -> list[Kernel]:
    """Every kernel of an object file; what spills has a stack."""
    done = subprocess.run([cuobjdump, "-res-usage", binary], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels, architecture, symbol = [], "", ""
    for line in done.stdout.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            symbol = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            kernels.append(Kernel(*demangle(symbol), architecture, registers, shared, stack, local, None))
    return kernels


def read_opcodes(cuobjdump: str, binary: Path, architecture: str) -> dict[tuple, Counter[str]]:
    """Opcodes of every kernel of a fat binary by its name, template arguments and architecture."""
    found: dict[tuple, Counter[str]] = {}
    done = subprocess.run([cuobjdump, "-sass", "-arch", architecture, binary], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    opcodes: Counter[str] = Counter()
    for line in done.stdout.splitlines():
        if match := re.match(r"\s+Function : (\w+)", line):
            opcodes = found[(*demangle(match[1]), architecture)] = Counter()
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", line):
            opcodes[match[1]] += 1
    return found


@pytest.fixture(scope="session")
def nvcc():
    path = find_nvcc()
    if path is None:
        pytest.skip("nvcc is not in CUDA_HOME, PATH or /usr/local/cuda")
    return path


@pytest.fixture(scope="session")
def architectures(nvcc):
    """Those of setup.py that this nvcc knows."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return tuple(architecture for architecture in ARCHITECTURES if architecture in known)


@pytest.fixture(scope="session")
def cuobjdump():
    path = find_cuobjdump()
    if path is None:
        pytest.skip("cuobjdump is neither on PATH nor in the package triton")
    return path


def built_for_all(folder: Path, architectures: tuple[str, ...]) -> bool:
    """Whether setup.py left its objects there, for each of these."""
    ninja_file = folder / "build.ninja"
    return ninja_file.is_file() and f",{','.join(architectures)}]" in ninja_file.read_text()


@pytest.fixture(scope="session")
def binaries(architectures):
    """The objects that setup.py makes of every source: those of the installation, else made here and kept."""
    folder = next((path for path in BUILD.glob("temp.*") if built_for_all(path, architectures)), None)
    if folder is None:
        folder = BUILD / "codegen"
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", folder, "--build-lib", folder]
        settings = {"SIGNAL_REID_BUILD_CUDA": "1", "SIGNAL_REID_CUDA_ARCHS": ";".join(architectures).replace("sm_", "")}
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
    else:
        names = [f"{path.stem}.o" for path in CSRC.glob("*.cu")]
        done = subprocess.run(["ninja", "-C", folder, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [folder / f"{path.stem}.o" for path in sorted(CSRC.glob("*.cu"))]


@pytest.fixture(scope="session")
def kernels(binaries, cuobjdump):
    """Every kernel on every architecture."""
    return [kernel for binary in binaries for kernel in read_usage(cuobjdump, binary)]


@pytest.fixture(scope="session")
def disassembled(binaries, kernels, cuobjdump):
    """Those of two architectures with their opcodes."""
    found: dict[tuple, Counter[str]] = {}
    for binary in binaries:
        for architecture in DISASSEMBLED:
            found |= read_opcodes(cuobjdump, binary, architecture)
    chosen = [kernel for kernel in kernels if kernel.architecture in DISASSEMBLED]
    for kernel in chosen:
        kernel.opcodes = found[kernel.name, kernel.arguments, kernel.architecture]
    return chosen


@pytest.fixture
def compiled(nvcc, tmp_path):
    """Compile one text for sm_86: its only kernel, disassembled if a path to cuobjdump is given."""

    def build(text: str, *flags: str, cuobjdump: str | None = None) -> Kernel:
        source, binary = tmp_path / "source.cu", tmp_path / "source.fatbin"
        source.write_text(text)
        (kernel,) = read_report(compile_source(nvcc, source, binary, flags))
        if cuobjdump is not None:
            (kernel.opcodes,) = read_opcodes(cuobjdump, binary, "sm_86").values()
        return kernel

    return build

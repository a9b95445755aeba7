"""Compiles the CUDA sources with g++ against the host SIMT emulator.

Two variants of every build: the plain one watches shared memory for races, the sanitized one runs under the address and
undefined-behaviour sanitizers. Objects are kept under build/simt, named by what went into them.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "simt"

COMMON = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DSIGNAL_REID_SIMT_EMULATOR"]
INCLUDES = [f"-I{HERE / 'include'}", f"-I{CSRC}"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
RACE_HOOKS = ["-fsanitize=thread"]  # its calls at every access go to race_detector.cpp, libtsan is not linked


def build_emulated(sources: Sequence[Path] | None = None, sanitize: bool = False) -> ModuleType:
    """The native core as a Python module that runs on host memory; by default of all sources in csrc.

    A sanitized module needs a process started with `sanitizer_environment()`.
    """
    files = list(sources) if sources is not None else [CSRC / "bindings.cpp", *sorted(CSRC.glob("*.cu"))]
    library = _link(files, sanitize, ["-shared"], f"_C{'_sanitized' if sanitize else ''}.so")
    loader = importlib.machinery.ExtensionFileLoader("signal_reid_emulated._C", str(library))
    spec = importlib.util.spec_from_file_location("signal_reid_emulated._C", library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def install_emulated(package: Path) -> None:
    """Put the emulated core where an installed package has its native core: it then serves tensors of the host."""
    shutil.copy(str(build_emulated().__file__), package / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}")


def build_program(sources: Sequence[Path], sanitize: bool = False) -> Path:
    """An executable of kernels with a `main` that launches them."""
    return _link(list(sources), sanitize, [], f"{Path(sources[0]).stem}{'_sanitized' if sanitize else ''}")


def sanitizer_environment() -> dict[str, str]:
    """The environment in which Python can import a sanitized module."""
    # libstdc++ as well: where it comes later than libasan, the latter cannot follow exceptions.
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


def _link(sources: list[Path], sanitize: bool, kind: list[str], name: str) -> Path:
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test workers wait for the one that builds
        kernels = [s for s in sources if s.suffix == ".cu"]
        others = [s for s in sources if s.suffix != ".cu"]
        runtime = [HERE / "emulator.cpp", HERE / "race_detector.cpp"]
        # Shared variables are found between the two markers, so the order of the objects matters.
        ordered = [HERE / "shared_begin.cpp", *kernels, HERE / "shared_end.cpp", *runtime, *others]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: _object(source, sanitize), ordered))
        flags = [*kind, *(SANITIZERS if sanitize else [])]
        target = CACHE / _key([*flags, *(o.name for o in objects)]) / name
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            _compile(["g++", *flags, *map(str, objects)], target)
    return target


def _object(source: Path, sanitize: bool) -> Path:
    flags = [*COMMON, *INCLUDES]
    if source.suffix == ".cu":
        flags += ["-O1", *WARNINGS, *(SANITIZERS if sanitize else RACE_HOOKS)]
    elif source.parent == HERE:
        flags += ["-O2", *WARNINGS, *(["-DSIMT_SANITIZED"] if sanitize else [])]  # only kernels are watched
    else:
        flags += ["-O1", f"-I{sysconfig.get_paths()['include']}", f"-I{_pybind11_include()}"]
    target = CACHE / f"{source.stem}-{_key([*flags, source.read_text(), _headers()])}.o"
    if not target.exists():
        _compile(["g++", *flags, "-x", "c++", "-c", str(source)], target)
    return target


def _compile(command: list[str], target: Path) -> None:
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    compiler_environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # it need not be watched itself
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, env=compiler_environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    os.replace(unfinished, target)


@cache
def _pybind11_include() -> str:
    import pybind11

    return str(Path(pybind11.get_include()).resolve())  # one directory has one name, and its objects one key


def _headers() -> str:
    headers = [*CSRC.glob("*.h"), *CSRC.glob("*.cuh"), *HERE.rglob("*.h")]
    return _key(path.read_text() for path in sorted(headers))


def _key(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    install_emulated(Path(sys.argv[1]))

"""Builds the native core `signal_reid._C` with nvcc where there is one; torch is not needed for that.

SIGNAL_REID_BUILD_CUDA   auto (default): with nvcc if found; 1: fail without nvcc; 0: never
SIGNAL_REID_CUDA_ARCHS   such as "86;90"; default: those of 80, 86, 89, 90, 120 that nvcc knows
"""

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.c*") if path.suffix in (".cpp", ".cu"))
DEFAULT_ARCHITECTURES = ("80", "86", "89", "90", "120")


def cuda_wanted() -> str:
    choice = os.environ.get("SIGNAL_REID_BUILD_CUDA", "auto")
    if choice not in ("auto", "1", "0"):
        raise SystemExit(f"SIGNAL_REID_BUILD_CUDA must be auto, 1 or 0, got {choice!r}")
    return choice


def find_nvcc() -> Path | None:
    """The first nvcc of CUDA_HOME, PATH and /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home, "bin", "nvcc") for home in homes if home]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((path.resolve() for path in candidates if path.is_file()), None)


def architectures(nvcc: Path) -> list[str]:
    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = re.findall(r"sm_(\d+)", listing)
    chosen = re.findall(r"[^;,\s]+", os.environ.get("SIGNAL_REID_CUDA_ARCHS", ""))
    for architecture in chosen:
        if architecture not in known:
            raise SystemExit(f"SIGNAL_REID_CUDA_ARCHS must name some of {';'.join(known)}, got {architecture!r}")
    return sorted(chosen or [a for a in DEFAULT_ARCHITECTURES if a in known], key=int)


def ninja_file(nvcc: Path, archs: list[str], target: Path) -> str:
    """nvcc compiles and links everything, as it knows where its own headers and libraries are."""
    import pybind11

    # One PTX of the oldest serves every newer GPU, and is compiled to machine code for each of these.
    codes = ",".join([f"compute_{archs[0]}", *(f"sm_{a}" for a in archs)])
    architecture = f"-gencode=arch=compute_{archs[0]},code=[{codes}]"
    common = [nvcc, "-std=c++17", "-O3", "--threads=0", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    bindings_only = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    bindings_only.append(f"-DSIGNAL_REID_ARCHITECTURES={'_'.join(archs)}")
    link = [nvcc, "-shared", "-cudart", "static", architecture, "-Xlinker", "-s"]
    rules = {"cu": [*common, architecture], "cpp": [*common, *bindings_only]}
    lines = ["rule link", f"  command = {quoted(link)} -o $out $in"]
    for suffix, command in rules.items():
        lines += [
            f"rule {suffix}",
            f"  command = {quoted(command)} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
        ]
    objects = [f"{Path(source).stem}.o" for source in SOURCES]
    for source, built in zip(SOURCES, objects, strict=True):
        lines.append(f"build {built}: {source.rpartition('.')[2]} {escaped(Path(source).resolve())}")
    lines.append(f"build {escaped(target.resolve())}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def quoted(command: list[object]) -> str:
    """A command as the shell that ninja starts reads it."""
    return shlex.join(map(str, command)).replace("$", "$$")


def escaped(path: Path) -> str:
    """A path as ninja reads it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


class BuildNativeCore(build_ext):
    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            raise SystemExit(
                "SIGNAL_REID_BUILD_CUDA=1 needs nvcc, which is not in CUDA_HOME, PATH or /usr/local/cuda; "
                "set CUDA_HOME, or SIGNAL_REID_BUILD_CUDA=auto to go without the CUDA kernels"
            )
        archs = architectures(nvcc)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(nvcc, archs, target))
        if subprocess.run(["ninja", "-C", str(folder)]).returncode != 0:
            raise SystemExit(f"{nvcc} could not build the CUDA kernels; SIGNAL_REID_BUILD_CUDA=0 installs without them")
        print(f"signal-reid: built the CUDA kernels for {', '.join(f'sm_{a}' for a in archs)} with {nvcc}")


choice = cuda_wanted()
build_cuda = choice == "1" or (choice == "auto" and find_nvcc() is not None)
if not build_cuda:
    why = "SIGNAL_REID_BUILD_CUDA=0" if choice == "0" else "no nvcc in CUDA_HOME, PATH or /usr/local/cuda"
    print(f"signal-reid: the CUDA kernels are not built ({why})")

setup(
    ext_modules=[Extension("signal_reid._C", SOURCES)] if build_cuda else [],
    cmdclass={"build_ext": BuildNativeCore},
)

"""Builds the native core `signal_reid._C` with nvcc where there is one; torch is not needed for that.

SIGNAL_REID_BUILD_CUDA   auto (default): with nvcc if found; 1: fail without nvcc; 0: never
SIGNAL_REID_CUDA_ARCHS   such as "86;90"; default: those of 80, 86, 89, 90, 120 that nvcc knows
"""

import os
import re
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


def cuda_libraries(nvcc: Path) -> Path:
    """The folder of libcudart_static.a, whose place differs between toolkits."""
    home = nvcc.parent.parent
    for folder in (home / "lib64", home / "lib", *home.glob("targets/*/lib")):
        if (folder / "libcudart_static.a").is_file():
            return folder
    raise SystemExit(f"libcudart_static.a was not found below {home}, where nvcc is")


def ninja_file(nvcc: Path, archs: list[str], target: Path) -> str:
    import pybind11

    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")  # PTX, for GPUs to come
    names = ",".join(f'\\"{a}\\"' for a in archs)
    includes = " ".join(f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"]))
    root = Path.cwd()
    objects = [f"{Path(source).stem}.o" for source in SOURCES]
    lines = [
        f"root = {root}",
        "rule nvcc",
        f"  command = {nvcc} -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden -MD -MF $out.d"
        f" {' '.join(codes)} -c $in -o $out",
        "  depfile = $out.d",
        "rule cxx",
        f"  command = {os.environ.get('CXX', 'c++')} -std=c++17 -O2 -fPIC -fvisibility=hidden -MD -MF $out.d {includes}"
        f" -I{nvcc.parent.parent / 'include'} '-DSIGNAL_REID_ARCHITECTURES={names}' -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = {os.environ.get('CXX', 'c++')} -shared -s -o $out $in -L{cuda_libraries(nvcc)} -lcudart_static -lrt"
        " -ldl -lpthread",
    ]
    for source, built in zip(SOURCES, objects, strict=True):
        lines.append(f"build {built}: {'nvcc' if source.endswith('.cu') else 'cxx'} $root/{source}")
    lines.append(f"build {target.resolve()}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


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
        subprocess.run(["ninja", "-C", str(folder)], check=True)
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

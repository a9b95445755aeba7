"""Builds the native core `signal_reid._C` with nvcc where there is one; torch is not needed for that.

SIGNAL_REID_BUILD_CUDA   auto (default): with nvcc if it works; 1: fail without; 0: never
SIGNAL_REID_CUDA_ARCHS   such as "86;90"; default: those of 80, 86, 89, 90, 120 that nvcc knows

With `auto` nothing that is wrong with nvcc, the host compiler or ninja fails the installation: the package is installed
without the kernels, and the reason is in one line of the output and in `signal_reid/_build.json`.
"""

import importlib.machinery
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.c*") if path.suffix in (".cpp", ".cu"))
DEFAULT_ARCHITECTURES = ("80", "86", "89", "90", "120")
OLDEST_NVCC = (11, 8)  # the first with cudaLaunchKernelEx
SECONDS_TO_ANSWER = 60.0
"""How long nvcc may take to say its version, which on a cold network disk is longer than one thinks."""
NO_NVCC = "no nvcc in CUDA_HOME, PATH or /usr/local/cuda"


class CannotBuildError(Exception):
    """The kernels cannot be built; the message says why in one line."""


@cache
def records() -> Any:
    """`signal_reid.ops.cuda.record`, without the package, which imports torch."""
    spec = importlib.util.spec_from_file_location("_signal_reid_record", "signal_reid/ops/cuda/record.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cuda_wanted() -> str:
    choice = os.environ.get("SIGNAL_REID_BUILD_CUDA", "auto")
    if choice not in ("auto", "1", "0"):
        raise SystemExit(f"SIGNAL_REID_BUILD_CUDA must be auto, 1 or 0, got {choice!r}")
    return choice


def find_nvcc() -> Path | None:
    """The first nvcc of CUDA_HOME, PATH and /usr/local/cuda; a link stays one, as it may lead to a compiler cache."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home, "bin", "nvcc") for home in homes if home]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((path.absolute() for path in candidates if path.is_file()), None)


def answer(nvcc: Path, *options: str) -> str:
    """What nvcc prints, both streams together.

    Raises:
        CannotBuildError: it may not be executed, fails, or does not end in time.
    """
    command = [str(nvcc), *options]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        # A session of its own, so that what a script has started ends with it.
        process = subprocess.Popen(command, start_new_session=True, text=True, errors="replace", **pipes)
    except OSError as error:
        raise CannotBuildError(f"{nvcc} cannot be executed: {error.strerror}") from None
    try:
        printed, _ = process.communicate(timeout=SECONDS_TO_ANSWER)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise CannotBuildError(f"{nvcc} {options[0]} did not end within {SECONDS_TO_ANSWER:g} s") from None
    if process.returncode != 0:
        last = printed.strip().rpartition("\n")[2] or f"exit code {process.returncode}"
        raise CannotBuildError(f"{nvcc} {options[0]} fails: {last}")
    return printed


def version_of(nvcc: Path) -> tuple[int, int]:
    found = re.search(r"release (\d+)\.(\d+)", answer(nvcc, "--version"))
    if found is None:
        raise CannotBuildError(f"{nvcc} --version names no release")
    version = int(found[1]), int(found[2])
    if version < OLDEST_NVCC:
        raise CannotBuildError("{} is of CUDA {}.{}, too old for the kernels, which need 11.8".format(nvcc, *version))
    return version


def known_architectures(nvcc: Path) -> list[str]:
    known = sorted(re.findall(r"sm_(\d+)\b", answer(nvcc, "--list-gpu-code")), key=int)
    if not known:
        raise CannotBuildError(f"{nvcc} --list-gpu-code names no architecture")
    return known


def architectures(known: list[str]) -> list[str]:
    """The architectures to build for, the oldest first."""
    chosen = re.findall(r"[^;,\s]+", os.environ.get("SIGNAL_REID_CUDA_ARCHS", ""))
    for architecture in chosen:
        if architecture not in known:
            raise CannotBuildError(
                f"SIGNAL_REID_CUDA_ARCHS must name some of {';'.join(known)}, for which this nvcc compiles, "
                f"got {architecture!r}"
            )
    usual = [a for a in DEFAULT_ARCHITECTURES if a in known]
    return sorted(set(chosen or usual or known[-1:]), key=int)


def library_folders(nvcc: Path) -> list[Path]:
    """Where the static CUDA runtime lies: PyPI's nvcc 13 looks in lib64 and has it in lib."""
    homes = [nvcc.parent.parent, nvcc.resolve().parent.parent]
    with suppress(CannotBuildError):  # a script or a cache that stands for nvcc knows where the real one is
        homes += re.findall(r"^#\$ TOP=(.+)$", answer(nvcc, "-dryrun", "-x", "cu", "-c", os.devnull), re.MULTILINE)
    folders = [Path(home, name) for home in homes for name in ("lib64", "lib")]
    return [f for f in dict.fromkeys(map(Path.resolve, folders)) if Path(f, "libcudart_static.a").is_file()]


def find_ninja() -> str:
    """The binary of the package ninja, which is there although the environment's scripts are not on PATH; or PATH's."""
    try:
        import ninja
    except ImportError:
        pass
    else:
        if found := shutil.which("ninja", path=ninja.BIN_DIR):
            return found
    if found := shutil.which("ninja"):
        return found
    raise CannotBuildError("there is no ninja (pip install ninja)")


def ninja_file(nvcc: Path, archs: list[str], target: Path) -> str:
    """nvcc compiles and links everything, as it knows where its own headers and libraries are."""
    try:
        import pybind11
    except ImportError:
        raise CannotBuildError("pybind11 is not installed (pip install pybind11)") from None

    architecture = code_options(archs)
    common = [nvcc, "-std=c++17", "-O3", "--threads=0", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    bindings_only = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    bindings_only.append(f"-DSIGNAL_REID_ARCHITECTURES={'_'.join(archs)}")
    link = [nvcc, "-shared", "-cudart", "static", *architecture, "-Xlinker", "-s"]
    link += [f"-L{folder}" for folder in library_folders(nvcc)]
    rules = {"cu": [*common, *architecture], "cpp": [*common, *bindings_only]}
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


def code_options(archs: list[str]) -> list[str]:
    """One PTX of the oldest serves every newer GPU, and is compiled to machine code for each of these.

    PTX of before sm_80 lacks what is written for tensor cores, so GPUs from there on have a PTX of their own.
    """
    older = [a for a in archs if int(a) < 80]
    options = []
    for group in (older, archs[len(older) :]):
        if group:
            codes = ",".join([f"compute_{group[0]}", *(f"sm_{a}" for a in group)])
            options.append(f"-gencode=arch=compute_{group[0]},code=[{codes}]")
    return options


def quoted(command: list[object]) -> str:
    """A command as the shell that ninja starts reads it."""
    return shlex.join(map(str, command)).replace("$", "$$")


def escaped(path: Path) -> str:
    """A path as ninja reads it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def lines_of(command: list[str]) -> Iterator[str]:
    """Run a command, pass its output on as it comes, and yield its lines; the last one is its exit code."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            yield line.strip()
    yield str(process.returncode)


def compile_core(folder: Path) -> None:
    """Run ninja.

    Raises:
        CannotBuildError: it fails; the message holds the compiler's first words about it.
    """
    *lines, status = lines_of([find_ninja(), "-C", str(folder)])
    if status != "0":
        raise CannotBuildError(explained(lines))


def explained(lines: list[str]) -> str:
    """The first error among a build's output, and what helps where that is known."""
    commands = ("ninja:", "FAILED:", "[")
    errors = [line for line in lines if re.search(r"\berror\b|\bfatal\b|not found|[Kk]illed|cannot find", line)]
    errors = [line for line in errors if not line.startswith(commands)]
    failed = [line for line in lines if line.startswith("FAILED:")]  # says at least of which file
    first = next(iter([*errors, *failed, *lines[-1:], "no output"]))[:240]
    if found := re.search(r"unsupported GNU version! gcc versions later than (\d+)", "\n".join(lines)):
        newest = found[1]
        return (
            f"nvcc takes g++ {newest} at most: install g++-{newest} and set NVCC_PREPEND_FLAGS='-ccbin g++-{newest}' "
            f"({first})"
        )
    if re.search(r"g\+\+: not found|preprocess host compiler properties|No such file or directory.*'?g\+\+", first):
        return f"nvcc finds no host compiler: install g++ ({first})"
    return first


class Build(build):
    """As usual, but the native core's step always runs, as it writes the record, and old output does not linger."""

    sub_commands: ClassVar = [(name, None if name == "build_ext" else when) for name, when in build.sub_commands]

    def run(self) -> None:
        # Everything in build_lib goes into the wheel, modules that the sources no longer have included.
        shutil.rmtree(Path(self.build_lib, "signal_reid"), ignore_errors=True)
        super().run()


class BuildNativeCore(build_ext):
    def run(self) -> None:
        in_place = self.inplace  # which the run of setuptools forgets where it fails
        try:
            record = self.build_core()
        except CannotBuildError as error:
            self.inplace = in_place
            if cuda_wanted() == "1":
                raise SystemExit(refusal(str(error))) from None
            self.go_without_core()
            record = records().Record(reason=str(error))
            print(f"signal-reid: the CUDA kernels are not built ({error})", flush=True)
        for package in self.packages():
            package.mkdir(parents=True, exist_ok=True)
            records().write(record, package)

    def build_core(self) -> Any:
        """Build the core, copy it to its place in the sources where that is asked for, and say what it is."""
        if not self.extensions:
            raise CannotBuildError("SIGNAL_REID_BUILD_CUDA=0" if cuda_wanted() == "0" else NO_NVCC)
        nvcc = find_nvcc()
        if nvcc is None:
            raise CannotBuildError(NO_NVCC)
        version = version_of(nvcc)
        known = known_architectures(nvcc)
        self.nvcc, self.architectures = nvcc, architectures(known)
        self.compile()
        print(f"signal-reid: built the CUDA kernels for {', '.join(f'sm_{a}' for a in self.architectures)} with {nvcc}")
        return records().Record(
            core=records().digest(Path(self.build_lib, self.get_ext_filename("signal_reid._C"))),
            sources=records().digest_of_sources(Path("csrc")),
            architectures=self.architectures,
            known=known,
            nvcc="{}.{}".format(*version),
            site=sysconfig.get_path("purelib") if self.editable_mode else "",
        )

    def compile(self) -> None:
        """What setuptools does, and nothing that goes wrong in it may fail an installation that can do without."""
        try:
            super().run()
        except (OSError, BaseError) as error:
            raise CannotBuildError(" ".join(str(error).split())) from None

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(self.nvcc, self.architectures, target))
        compile_core(folder)
        if not target.is_file():
            raise CannotBuildError(f"{self.nvcc} says that it compiled, and wrote nothing")

    def go_without_core(self) -> None:
        """Leave no core of an earlier build in use, and make the wheel one for every platform."""
        self.extensions = self.distribution.ext_modules = []
        for package in self.packages():
            for suffix in importlib.machinery.EXTENSION_SUFFIXES:
                Path(package, f"_C{suffix}").unlink(missing_ok=True)
        if wheel := self.distribution.get_command_obj("bdist_wheel", create=False):
            wheel.root_is_pure = True

    def packages(self) -> list[Path]:
        """Where the package is: in the build's output, and in the sources where that is asked for."""
        return [Path(self.build_lib, "signal_reid"), *([Path("signal_reid")] if self.inplace else [])]

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), *self.get_output_mapping()]

    def get_output_mapping(self) -> dict[str, str]:
        name = "signal_reid/_build.json"
        return {**super().get_output_mapping(), **({f"{self.build_lib}/{name}": name} if self.inplace else {})}


def refusal(trouble: str) -> str:
    if trouble == NO_NVCC:
        return (
            "SIGNAL_REID_BUILD_CUDA=1 needs nvcc, which is not in CUDA_HOME, PATH or /usr/local/cuda; "
            "set CUDA_HOME, or SIGNAL_REID_BUILD_CUDA=auto to go without the CUDA kernels"
        )
    return f"SIGNAL_REID_BUILD_CUDA=1, but {trouble}; SIGNAL_REID_BUILD_CUDA=0 installs without the CUDA kernels"


def main() -> None:
    choice = cuda_wanted()
    build_cuda = choice == "1" or (choice == "auto" and find_nvcc() is not None)
    setup(
        ext_modules=[Extension("signal_reid._C", SOURCES)] if build_cuda else [],
        cmdclass={"build": Build, "build_ext": BuildNativeCore},
    )


if __name__ == "__main__":
    main()

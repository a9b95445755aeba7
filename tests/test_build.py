"""Installing builds the CUDA kernels where nvcc is, says so, and needs no torch for it."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NVCC = next((p for p in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc") if p and Path(p).is_file()), None)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What git has of the project and its build, without what earlier builds left behind."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("csrc", "signal_reid"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def no_nvcc():
    """An environment in which setup.py finds no nvcc, not even in /usr/local/cuda."""
    return {"CUDA_HOME": "/nonexistent", "CUDA_PATH": "/nonexistent", "PATH": "/nonexistent", "BLIND": "1"}


def build(checkout, output, what="wheel", **environment):
    """Run the build backend as pip does, in a process of its own; `BLIND` hides every nvcc from setup.py."""
    program = f"""
import os, pathlib
if os.environ.get("BLIND"):
    is_file = pathlib.Path.is_file
    pathlib.Path.is_file = lambda path: path.name != "nvcc" and is_file(path)
from setuptools import build_meta
print(build_meta.build_{what}({str(output)!r}))
import sys
assert "torch" not in sys.modules
"""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SIGNAL_REID_")}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=checkout,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )


def contents(output):
    (wheel,) = output.glob("*.whl")
    return wheel.name, zipfile.ZipFile(wheel).namelist()


def test_zero_gives_a_pure_python_wheel_and_says_so(checkout, tmp_path):
    done = build(checkout, tmp_path, SIGNAL_REID_BUILD_CUDA="0")
    assert "the CUDA kernels are not built (SIGNAL_REID_BUILD_CUDA=0)" in done.stdout
    name, files = contents(tmp_path)
    assert name.endswith("-py3-none-any.whl")
    assert "signal_reid/ops/cuda/core.py" in files
    assert not any("_C." in file for file in files)


def test_auto_without_nvcc_does_the_same(checkout, tmp_path, no_nvcc):
    done = build(checkout, tmp_path, **no_nvcc)
    assert "the CUDA kernels are not built (no nvcc in CUDA_HOME, PATH or /usr/local/cuda)" in done.stdout
    assert contents(tmp_path)[0].endswith("-py3-none-any.whl")


def test_one_without_nvcc_fails_in_one_line(checkout, tmp_path, no_nvcc):
    done = build(checkout, tmp_path, SIGNAL_REID_BUILD_CUDA="1", **no_nvcc)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("SIGNAL_REID_BUILD_CUDA=1 needs nvcc, which is not in CUDA_HOME")
    assert not list(tmp_path.iterdir())


def test_another_choice_is_refused(checkout, tmp_path):
    done = build(checkout, tmp_path, SIGNAL_REID_BUILD_CUDA="yes")
    assert done.stderr.splitlines()[-1] == "SIGNAL_REID_BUILD_CUDA must be auto, 1 or 0, got 'yes'"


def test_a_source_distribution_holds_the_kernels(checkout, tmp_path):
    build(checkout, tmp_path, what="sdist", SIGNAL_REID_BUILD_CUDA="0")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        packed = {Path(*Path(name).parts[1:]).as_posix() for name in opened.getnames()}
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir()} <= packed
    assert "setup.py" in packed


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
def test_an_unknown_architecture_is_refused(checkout, tmp_path):
    done = build(checkout, tmp_path, SIGNAL_REID_BUILD_CUDA="1", SIGNAL_REID_CUDA_ARCHS="86;12345")
    assert "SIGNAL_REID_CUDA_ARCHS must name some of" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].endswith("got '12345'")


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
def test_the_core_builds_for_one_architecture_and_imports_without_a_gpu(checkout, tmp_path):
    # Unoptimised: what this asks is whether it builds, which takes a third of the time so.
    quick = {"NVCC_APPEND_FLAGS": "-Xcicc=-O0 -Xptxas=-O0"}
    done = build(checkout, tmp_path, SIGNAL_REID_BUILD_CUDA="1", SIGNAL_REID_CUDA_ARCHS="86", **quick)
    assert "signal-reid: built the CUDA kernels for sm_86 with" in done.stdout, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (core,) = [name for name in archive.namelist() if name.startswith("signal_reid/_C.")]
        archive.extract(core, tmp_path)
    program = (
        "import _C; assert _C.architectures == ('86',)\n"
        "fields = dict.fromkeys(('x', 'y', 'size', 'dtype', 'stream'), 0)\n"
        "_C.quick_gelu(fields)\n"  # no elements: nothing is launched
        "try: _C.quick_gelu({**fields, 'size': 1, 'dtype': 9})\n"
        "except RuntimeError as error: print(error)"
    )
    imported = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "signal_reid", capture_output=True, text=True
    )
    assert imported.stdout == "quick_gelu: invalid argument\n", imported.stderr

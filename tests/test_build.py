"""Installing builds the CUDA kernels where nvcc works, says so or why not, and needs no torch for it."""

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from setuptools import Distribution, Extension

import signal_reid
from signal_reid.ops.cuda import core, record

ROOT = Path(__file__).resolve().parent.parent
PIP_AGAIN = "pip install --no-cache-dir --force-reinstall --no-deps ..."
NVCC = next((p for p in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc") if p and Path(p).is_file()), None)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What git has of the project and its build, without what earlier builds left behind."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("csrc", "signal_reid"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", record.NAME))
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


VERSION = "Cuda compilation tools, release 11.8, V11.8.89"
REFUSES_THE_HOST_COMPILER = f"""case "$*" in
*--version*) echo "{VERSION}" ;;
*--list-gpu-code*) echo sm_80 ;;
*) echo "host_config.h:132:2: error: #error -- unsupported GNU version! gcc versions later than 11 are not supported!"
   exit 1 ;;
esac"""
ADVICE = "install g++-11 and set NVCC_PREPEND_FLAGS='-ccbin g++-11'"


@pytest.fixture
def fake_nvcc(tmp_path):
    """Writes a script where CUDA_HOME/bin/nvcc is, and returns its path."""

    def make(script, executable=True):
        nvcc = tmp_path / "cuda" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True, exist_ok=True)
        nvcc.write_text(f"#!/bin/sh\n{script}\n")
        nvcc.chmod(0o755 if executable else 0o644)
        return nvcc

    return make


@pytest.fixture(scope="module")
def setup_module():
    """setup.py as a module, which sets nothing up."""
    spec = importlib.util.spec_from_file_location("setup_of_signal_reid", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("script", "trouble"),
    [
        ("exec sleep 100", "NVCC --version did not end within 0.1 s"),
        ("sleep 100; true", "NVCC --version did not end within 0.1 s"),
        (None, "NVCC cannot be executed: Permission denied"),
        ("echo no libfoo.so >&2; exit 127", "NVCC --version fails: no libfoo.so"),
        ("exit 3", "NVCC --version fails: exit code 3"),
        ("true", "NVCC --version names no release"),
        ("echo release 11.7, V11.7.99", "NVCC is of CUDA 11.7, too old for the kernels, which need 11.8"),
    ],
)
def test_what_is_wrong_with_nvcc_is_one_line(setup_module, fake_nvcc, monkeypatch, script, trouble):
    nvcc = fake_nvcc(script or "true", executable=script is not None)
    monkeypatch.setattr(setup_module, "SECONDS_TO_ANSWER", 0.1 if "sleep" in (script or "") else 60)
    with pytest.raises(setup_module.CannotBuildError) as caught:
        setup_module.version_of(nvcc)
    assert str(caught.value).replace(str(nvcc), "NVCC") == trouble


def test_a_link_to_a_compiler_cache_is_called_by_its_own_name(setup_module, fake_nvcc, tmp_path, monkeypatch):
    cache = fake_nvcc('basename "$0"').rename(tmp_path / "cache")
    (tmp_path / "cuda" / "bin" / "nvcc").symlink_to(cache)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert setup_module.answer(setup_module.find_nvcc(), "--version") == "nvcc\n"


def test_the_static_runtime_is_found_in_lib_and_where_a_script_says(setup_module, fake_nvcc, tmp_path):
    nvcc = fake_nvcc(f"echo '#$ TOP={tmp_path}/elsewhere/bin/..'")
    wanted = [tmp_path / "cuda" / "lib", tmp_path / "elsewhere" / "lib64"]
    for folder in (*wanted, tmp_path / "elsewhere" / "bin"):
        folder.mkdir(parents=True)
        (folder / "libcudart_static.a").touch()
    assert setup_module.library_folders(nvcc) == wanted


def test_ninja_is_the_package_s_own_or_the_path_s_or_one_line(setup_module, tmp_path, monkeypatch):
    pytest.importorskip("ninja")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Path(setup_module.find_ninja()).name == "ninja"
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(setup_module.CannotBuildError, match="there is no ninja"):
        setup_module.find_ninja()
    (tmp_path / "ninja").touch(mode=0o755)
    assert setup_module.find_ninja() == str(tmp_path / "ninja")


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (["[1/2] nvcc -o error.o", "FAILED: error.o", "x.cu(3): error: no", "y"], "x.cu(3): error: no"),
        (["sh: 1: g++: not found"], "nvcc finds no host compiler: install g++ (sh: 1: g++: not found)"),
        (["x", "Killed", "ninja: build stopped: subcommand failed."], "Killed"),
        (["[1/2] nvcc", "FAILED: a.o", "nvcc", "ninja: build stopped: subcommand failed."], "FAILED: a.o"),
        (["who knows"], "who knows"),
        ([], "no output"),
    ],
)
def test_the_first_error_is_the_reason(setup_module, output, reason):
    assert setup_module.explained(output) == reason


def test_auto_goes_on_without_kernels_where_nvcc_refuses_the_host_compiler(checkout, tmp_path, fake_nvcc):
    home = fake_nvcc(REFUSES_THE_HOST_COMPILER).parents[1]
    done = build(checkout, tmp_path, CUDA_HOME=str(home))
    assert f"signal-reid: the CUDA kernels are not built (nvcc takes g++ 11 at most: {ADVICE}" in done.stdout
    name, files = contents(tmp_path)
    assert name.endswith("-py3-none-any.whl")
    assert not any("_C." in file for file in files)
    with zipfile.ZipFile(tmp_path / name) as archive:
        archive.extract(f"signal_reid/{record.NAME}", tmp_path)
    assert ADVICE in record.read(tmp_path / "signal_reid").reason


def test_auto_goes_on_where_nvcc_writes_nothing_or_the_disk_refuses(setup_module, fake_nvcc, tmp_path, monkeypatch):
    nvcc = fake_nvcc(f'case "$*" in *--version*) echo "{VERSION}" ;; *--list-gpu-code*) echo sm_80 ;; esac')
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parents[1]))
    monkeypatch.chdir(ROOT)
    (tmp_path / "file").touch()

    def reason(temporary):
        command = setup_module.BuildNativeCore(Distribution({"ext_modules": [Extension("signal_reid._C", ["a.cpp"])]}))
        command.build_lib, command.build_temp = str(tmp_path / "lib"), str(temporary)
        command.ensure_finalized()
        command.run()
        return record.read(tmp_path / "lib" / "signal_reid").reason

    assert reason(tmp_path / "temp").endswith("says that it compiled, and wrote nothing")
    assert "Not a directory" in reason(tmp_path / "file" / "temp")


def test_one_fails_there_in_the_compiler_s_own_words(checkout, tmp_path, fake_nvcc):
    home = fake_nvcc(REFUSES_THE_HOST_COMPILER).parents[1]
    done = build(checkout, tmp_path, SIGNAL_REID_BUILD_CUDA="1", CUDA_HOME=str(home))
    assert done.returncode != 0
    assert "unsupported GNU version! gcc versions later than 11 are not supported!" in done.stdout
    assert done.stderr.splitlines()[-1].startswith(f"SIGNAL_REID_BUILD_CUDA=1, but nvcc takes g++ 11 at most: {ADVICE}")


def test_an_editable_installation_without_kernels_leaves_no_earlier_core(checkout, tmp_path):
    package = checkout / "signal_reid"
    earlier = package / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    earlier.touch()
    done = build(checkout, tmp_path, what="editable", SIGNAL_REID_BUILD_CUDA="0")
    assert not earlier.exists(), done.stderr
    assert record.read(package) == record.Record(reason="SIGNAL_REID_BUILD_CUDA=0")
    (package / record.NAME).unlink()


@pytest.fixture
def in_place(tmp_path, monkeypatch):
    """A checkout with a core and its record, which `core` looks at; returns a function that replaces the record."""
    package, csrc = tmp_path / "signal_reid", tmp_path / "csrc"
    package.mkdir(), csrc.mkdir()
    (csrc / "a.cu").write_text("one")
    compiled = package / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    compiled.write_bytes(b"a core")
    monkeypatch.setattr(core, "PACKAGE", package)

    def put(**fields):
        usual = {"core": record.digest(compiled), "sources": record.digest_of_sources(csrc), "nvcc": "13.0"}
        record.write(record.Record(**{**usual, **fields}), package)
        return compiled

    return put


def test_a_core_is_used_with_its_record_and_without_one(in_place):
    compiled = in_place()
    assert core._reason_against_use() is None
    compiled.with_name(record.NAME).unlink()
    assert core._reason_against_use() is None
    in_place(core="0" * 64, sources="of another core", site="/gone")  # not about the one that somebody put there
    assert core._reason_against_use() is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"core": 1}', "\0"])
def test_a_damaged_record_is_none(in_place, text):
    compiled = in_place()
    compiled.with_name(record.NAME).write_text(text)
    assert record.read(compiled.parent) is None
    assert core._reason_against_use() is None


def test_a_core_of_other_sources_is_refused_with_how_to_build_it_again(in_place, tmp_path):
    in_place()
    (tmp_path / "csrc" / "a.cu").write_text("two")
    reason = core._reason_against_use()
    assert reason.startswith("the native core was compiled from other sources than ")
    assert reason.endswith("build it again (python setup.py build_ext --inplace)")


def test_a_core_goes_with_the_editable_installation_that_it_belongs_to(in_place, tmp_path):
    site = tmp_path / "site"
    information = site / "signal_reid-0.1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: signal-reid\nVersion: 0.1.0\n")
    origin = information / "direct_url.json"
    origin.write_text(f'{{"url": "{tmp_path.as_uri()}", "dir_info": {{"editable": true}}}}')
    compiled = in_place(site=str(site))
    assert core._reason_against_use() is None
    origin.write_text(f'{{"url": "{tmp_path.as_uri()}", "dir_info": {{}}}}')  # installed over it, not editable
    assert core._reason_against_use().startswith(f"the native core {compiled} is left over from an editable")
    shutil.rmtree(information)
    assert "is left over from an editable installation that is gone" in core._reason_against_use()


def test_without_a_core_the_reason_is_that_of_the_build(in_place):
    in_place(core="", reason="no luck").unlink()
    # All of it: each of pip's options alone leaves an installation from an archive, an index or a repository as it is.
    assert core._reason_against_use() == (
        f"the native core is not built (no luck); to insist on it, install again: SIGNAL_REID_BUILD_CUDA=1 {PIP_AGAIN}"
    )


def test_an_older_card_is_advised_no_architecture_that_nvcc_refuses():
    def advice(capability, *known, built=("80", "90")):
        build = record.Record(known=known, nvcc="13.0") if known else None
        reason = core._reason_against_capability(built, capability, build)
        return reason and reason.replace(f"SIGNAL_REID_BUILD_CUDA=1 {PIP_AGAIN}", "").partition("; ")[2].strip()

    of_volta = "nvcc {} does not compile for that, nvcc 12 does: with its CUDA_HOME, install again: {}"
    assert advice((8, 6), "75", "80") is None
    assert advice((7, 5), "75", "80") == "install again: SIGNAL_REID_CUDA_ARCHS='75;80;90'"
    assert advice((7, 0), "75", "80") == of_volta.format("13.0", "SIGNAL_REID_CUDA_ARCHS=70")
    assert advice((7, 0)) == of_volta.format("13", "SIGNAL_REID_CUDA_ARCHS=70")
    assert advice((7, 0), "70", "80") == "install again: SIGNAL_REID_CUDA_ARCHS='70;80;90'"
    # The PTX of sm_100 serves a GPU that this nvcc has not heard of.
    assert advice((10, 3), "90", "100", "120", built=("120",)) == "install again: SIGNAL_REID_CUDA_ARCHS='100;120'"
    assert core._reason_against_capability(("80",), (3, 7), None).endswith("and the kernels need sm_50 or newer")


def test_zero_gives_a_pure_python_wheel_and_says_so(checkout, tmp_path):
    lingering = checkout / "build" / "lib" / "signal_reid" / "removed_from_the_sources.py"
    lingering.parent.mkdir(parents=True, exist_ok=True)
    lingering.touch()
    done = build(checkout, tmp_path, SIGNAL_REID_BUILD_CUDA="0")
    assert "the CUDA kernels are not built (SIGNAL_REID_BUILD_CUDA=0)" in done.stdout
    name, files = contents(tmp_path)
    assert name.endswith("-py3-none-any.whl")
    assert "signal_reid/ops/cuda/core.py" in files
    assert "signal_reid/removed_from_the_sources.py" not in files
    assert not any("_C." in file for file in files)


def test_auto_without_nvcc_does_the_same(checkout, tmp_path, no_nvcc):
    done = build(checkout, tmp_path, **no_nvcc)
    assert "the CUDA kernels are not built (no nvcc in CUDA_HOME, PATH or /usr/local/cuda)" in done.stdout
    assert contents(tmp_path)[0].endswith("-py3-none-any.whl")


def test_one_without_nvcc_is_refused_in_one_line(setup_module):
    assert setup_module.refusal(setup_module.NO_NVCC).startswith(
        "SIGNAL_REID_BUILD_CUDA=1 needs nvcc, which is not in CUDA_HOME"
    )


def test_another_choice_is_refused(setup_module, monkeypatch):
    monkeypatch.setenv("SIGNAL_REID_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match=r"^SIGNAL_REID_BUILD_CUDA must be auto, 1 or 0, got 'yes'$"):
        setup_module.main()


def test_a_source_distribution_holds_the_kernels(checkout, tmp_path):
    build(checkout, tmp_path, what="sdist", SIGNAL_REID_BUILD_CUDA="0")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        packed = {Path(*Path(name).parts[1:]).as_posix() for name in opened.getnames()}
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir()} <= packed
    assert "setup.py" in packed
    assert f"signal_reid/{record.NAME}" not in packed


def test_an_unknown_architecture_is_refused(setup_module, monkeypatch):
    monkeypatch.setenv("SIGNAL_REID_CUDA_ARCHS", "86;12345")
    with pytest.raises(setup_module.CannotBuildError) as caught:
        setup_module.architectures(["80", "86"])
    assert (
        str(caught.value) == "SIGNAL_REID_CUDA_ARCHS must name some of 80;86, for which this nvcc compiles, got '12345'"
    )


def test_gpus_with_tensor_cores_never_run_what_was_compiled_without_them(setup_module, simt_build):
    options = setup_module.code_options(["75", "80", "86"])
    assert options == [
        "-gencode=arch=compute_75,code=[compute_75,sm_75]",
        "-gencode=arch=compute_80,code=[compute_80,sm_80,sm_86]",
    ]
    assert setup_module.code_options(["70"]) == ["-gencode=arch=compute_70,code=[compute_70,sm_70]"]
    assert setup_module.code_options(["86", "90"]) == ["-gencode=arch=compute_86,code=[compute_86,sm_86,sm_90]"]
    # And of 75 and 90 alone, an sm_86 runs the PTX of 75, and an sm_100 that of 90.
    program = """
    #include "tensor_cores.cuh"
    constexpr bool (*runs)(int) = signal_reid::runs_on_tensor_cores;
    static_assert(!runs(750) && !runs(860) && runs(900) && runs(1000));
    """
    flags = ["-D__CUDA_ARCH_LIST__=750,900", "-fsyntax-only", "-xc++", "-"]
    command = ["g++", *simt_build.COMMON, *simt_build.INCLUDES, *flags]
    checked = subprocess.run(command, input=program, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.fixture
def core_of_these_sources(checkout, tmp_path):
    """A folder with the core alone, and its architectures: the installed one where it was built from this csrc.

    Building takes a minute of two cores, and whoever has installed the package just did. Where that is not so, it is
    built for one architecture and unoptimised, which takes a third of the time.
    """
    installed = Path(signal_reid.__file__).parent
    found = record.read(installed)
    target = tmp_path / "signal_reid"
    if found is not None and found.core and found.sources == record.digest_of_sources(ROOT / "csrc"):
        target.mkdir()
        (built,) = installed.glob("_C.*")
        shutil.copy(built, target)
        return target, found.architectures
    quick = {"NVCC_APPEND_FLAGS": "-Xcicc=-O0 -Xptxas=-O0"}
    done = build(checkout, tmp_path, SIGNAL_REID_BUILD_CUDA="1", SIGNAL_REID_CUDA_ARCHS="86", **quick)
    assert "signal-reid: built the CUDA kernels for sm_86 with" in done.stdout, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.startswith("signal_reid/_C.")]
        archive.extract(name, tmp_path)
    return target, ("86",)


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
def test_the_core_is_built_and_imports_without_a_gpu(core_of_these_sources):
    folder, architectures = core_of_these_sources
    program = (
        f"import _C; assert _C.architectures == {architectures!r}\n"
        "fields = dict.fromkeys(('x', 'y', 'size', 'dtype', 'stream'), 0) | {'device': -1}\n"
        "_C.quick_gelu(fields)\n"  # no elements: nothing is launched
        "try: _C.quick_gelu({**fields, 'size': 1, 'dtype': 9})\n"
        "except RuntimeError as error: print(error)"
    )
    imported = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert imported.stdout == "quick_gelu: invalid argument\n", imported.stderr

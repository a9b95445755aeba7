"""The report on a GPU runs every part whatever fails, sums up, and says in one line that there is no GPU.

An interpreter that only notes how it was called stands in for Python.
"""

import os
import subprocess
import tarfile

import pytest

PARTS = ["build", "info", "tests", "memcheck", "racecheck", "initcheck", "synccheck", "benchmark of the operators"]


@pytest.fixture
def report(benchmarks_directory, tmp_path):
    """Run the script with a stand-in for Python, which prints a device name and fails where told to."""

    def run(device, *options, failing="nothing", missing="", **variables):
        python, sanitizer = tmp_path / "python", tmp_path / "compute-sanitizer"
        python.write_text(
            f'#!/bin/sh\ncase "$2" in *find_spec*) echo "{missing}"; exit;; esac\n'
            f'[ "$1" = -c ] && {{ echo "{device}"; exit; }}\n'
            f'echo "$@" "PYTHONPATH=$PYTHONPATH" >> {tmp_path}/calls\n'
            'all="$*"\nwhile [ $# -gt 0 ]; do [ "$1" = --json ] && echo [] > "$2"; shift; done\n'
            f'case "$all" in *"{failing}"*) exit 3;; esac\n'
        )
        sanitizer.write_text(f'#!/bin/sh\necho sanitizer "$@" >> {tmp_path}/calls\n')
        for file in (python, sanitizer):
            file.chmod(0o755)
        environment = {**os.environ, "PYTHON": str(python), "PATH": f"{tmp_path}:{os.environ['PATH']}", "UPSTREAM": ""}
        environment |= variables
        command = [str(benchmarks_directory / "gpu_report.sh"), *options, str(tmp_path / "results")]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    return run


def test_no_gpu_is_one_line_and_exit_code_2(report, tmp_path):
    done = report("")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gpu_report: no GPU that the torch of")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_every_part_runs_and_results_are_named_by_device_and_date(report, tmp_path):
    done = report("NVIDIA GeForce RTX 3090")
    assert done.returncode == 0, done.stderr
    for part in PARTS:
        assert f"{part:32} passed" in done.stdout
    calls = (tmp_path / "calls").read_text()
    for name in ("ops", "modules", "train_step", "metrics", "evaluation", "dataloading"):
        assert f"/benchmarks/{name}.py" in calls
        assert f"{tmp_path}/results/nvidia-geforce-rtx-3090-20" in calls
    assert calls.count("sanitizer --tool") == 4
    assert "test_gpu.py" in calls


def test_a_failing_part_is_named_and_stops_no_other(report):
    done = report("A GPU", failing="-m pytest")
    assert done.returncode == 1
    assert f"{'tests':32} FAILED (exit code 3)" in done.stdout
    assert done.stdout.count("passed") == 14


@pytest.mark.parametrize("variable", ["PYTHON", "UPSTREAM"])
def test_relative_paths_are_those_of_the_caller_s_directory(report, tmp_path, variable):
    (tmp_path / "checkout").mkdir()
    relative = {"PYTHON": "./python", "UPSTREAM": "checkout"}[variable]
    done = report("A GPU", **{variable: relative})
    assert done.returncode == 0, done.stdout
    assert (f"--upstream {tmp_path}/checkout" in (tmp_path / "calls").read_text()) == (variable == "UPSTREAM")


def test_a_checkout_that_is_not_there_is_one_line(report):
    done = report("A GPU", UPSTREAM="nowhere")
    assert done.returncode == 2
    assert done.stderr == "gpu_report: UPSTREAM must name a checkout of the authors' code\n"


def test_an_option_that_is_none_is_one_line(report, tmp_path):
    done = report("A GPU", "--all")
    assert done.returncode == 2
    assert done.stderr == "gpu_report: --all is none of --rehearse and --only PART\n"
    assert not (tmp_path / "calls").exists()


def test_a_rehearsal_needs_no_gpu_and_has_every_part_at_toy_sizes(report, tmp_path):
    done = report("", "--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    real = {"memcheck", "initcheck", "synccheck"}  # the emulator's check is one
    for part in set(PARTS) - real:
        assert f"{part:32} passed" in done.stdout
    calls = (tmp_path / "calls").read_text()
    assert "sanitizer" not in calls
    assert "tests/simt/build.py" in calls
    measured = [call for call in calls.splitlines() if "/benchmarks/" in call]
    assert len(measured) == 8
    assert all(f"{tmp_path}/results/rehearsal-20" in call and "--device cpu --batch" in call for call in measured)


def test_what_the_interpreter_lacks_is_named_at_once(report, tmp_path):
    done = report("A GPU", missing="pydantic matplotlib")
    assert done.returncode == 2
    assert "cannot import pydantic, matplotlib; install them, or put them on PYTHONPATH" in done.stderr
    assert not (tmp_path / "results").exists()


def test_the_caller_s_pythonpath_is_kept_behind_the_build(report, tmp_path):
    report("A GPU", PYTHONPATH="/wheels")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert all(call.endswith(":/wheels") for call in calls if not call.startswith("sanitizer"))


def test_parts_can_be_run_by_themselves(report, tmp_path):
    done = report("A GPU", "--only", "info", "--only", "benchmark of the modules")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("passed") == 3
    assert report("A GPU", "--only", "nothing").returncode == 2


def test_results_are_in_one_archive(report, tmp_path):
    report("A GPU")
    (archive,) = (tmp_path / "results").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        assert sorted(files.getnames()) == sorted(path.name for path in (tmp_path / "results").glob("*.json"))

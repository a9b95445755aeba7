"""The emulator runs kernels as a GPU would, and finds the bugs that a GPU would hide."""

import os
import subprocess

import pytest

BUGS_OF_SYNCHRONISATION = {
    "missing barrier, dynamic": "race: thread",
    "missing barrier, static": "race: thread",
    "missing syncwarp": "race: thread",
    "missing syncwarp after a copy": "race: thread",
    "barrier in branch": "divergent barrier: 16 threads wait at planted_bugs.cu",
    "barrier in both branches": "divergent barrier: some threads wait at planted_bugs.cu",
    "mismatched masks": "a warp collective's mask names it",
    "mask without caller": "calls a warp collective whose mask leaves it out",
}
BUGS_OF_ADDRESSING = {
    "past global": "heap-buffer-overflow",
    "past dynamic": "heap-buffer-overflow",
    "past static": "out of bounds",
    "misaligned": "misaligned",
}
CORRECT = ["barrier", "syncwarp", "collectives", "conversions", "tensor cores", "unwritten", "many blocks"]


@pytest.fixture(scope="module", params=["plain", "sanitized"])
def program(request, simt_build):
    return simt_build.build_program([simt_build.HERE / "planted_bugs.cu"], sanitize=request.param == "sanitized")


@pytest.fixture(scope="module")
def plain(simt_build):
    return simt_build.build_program([simt_build.HERE / "planted_bugs.cu"])


@pytest.fixture(scope="module")
def sanitized(simt_build):
    return simt_build.build_program([simt_build.HERE / "planted_bugs.cu"], sanitize=True)


def run(program, name, seed=1):
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program, name, str(seed)], capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize("name", CORRECT)
def test_correct_kernels_give_their_results(program, name):
    for seed in range(3):
        done = run(program, name, seed)
        assert done.returncode == 0, done.stdout + done.stderr
        assert set(done.stdout.splitlines()) == {"no error"}


@pytest.mark.parametrize("name", BUGS_OF_SYNCHRONISATION)
def test_bugs_of_synchronisation_are_named_under_any_schedule(plain, name):
    for seed in range(5):
        assert BUGS_OF_SYNCHRONISATION[name] in run(plain, name, seed).stdout


@pytest.mark.parametrize("name", BUGS_OF_ADDRESSING)
def test_bugs_of_addressing_are_found_by_the_sanitizers(sanitized, name):
    done = run(sanitized, name)
    assert done.returncode != 0
    assert BUGS_OF_ADDRESSING[name] in done.stderr


def test_a_missing_barrier_gives_wrong_results_too(sanitized):
    assert "wrong results" in run(sanitized, "missing barrier, dynamic").stdout


def test_what_is_copied_is_not_there_before_the_wait(sanitized):
    assert "wrong results" in run(sanitized, "missing wait for a copy").stdout


def test_threads_and_blocks_run_in_an_order_that_only_the_seed_decides(plain):
    orders = [run(plain, "order", seed).stdout for seed in (1, 1, 2, 3)]
    assert orders[0] == orders[1]
    assert len(set(orders)) == 3


def test_launches_that_no_gpu_accepts_are_refused(program):
    assert run(program, "limits").stdout.splitlines() == [
        "invalid configuration argument",  # 1025 threads
        "invalid configuration argument",  # no blocks
        "invalid configuration argument",  # 65536 blocks along y
        "invalid configuration argument",  # 65 threads along z
        "invalid argument",  # one byte of shared memory more than sm_86 has
        "no error",
    ]

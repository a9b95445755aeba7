"""A directory has one owner, which lets go of it however it ends."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from signal_reid.runtime.ownership import NAME, InUseError, owned

OWNER = """
import os, sys, time
from pathlib import Path
from signal_reid.runtime.ownership import owned
with owned(Path(sys.argv[1]), print):
    if os.fork() == 0:  # as a data-loading worker, which outlives its parent for a while
        time.sleep(60)
    print("mine", flush=True)
    time.sleep(60)
"""


def refuse_to_speak(line):
    raise AssertionError(line)


@pytest.fixture
def other(tmp_path):
    """Another process that owns a directory, and a worker of it."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, tmp_path / "run"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "mine\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_another_process_s_directory_is_refused_in_one_line_that_names_it(tmp_path, other):
    with (
        pytest.raises(InUseError, match=rf"run is in use by process {other.pid} on .+ since \d{{4}}-") as refused,
        owned(tmp_path / "run", refuse_to_speak),
    ):
        pass
    assert "\n" not in str(refused.value)


def test_a_killed_owner_leaves_it_free_at_once_though_its_workers_live(tmp_path, other):
    other.kill()
    other.wait()
    with owned(tmp_path / "run", refuse_to_speak):
        assert str(os.getpid()) in (tmp_path / "run" / NAME).read_text()


def test_its_owner_may_enter_again_and_no_other_thread(tmp_path):
    answers = []

    def enter():
        try:
            with owned(tmp_path, refuse_to_speak):
                answers.append("entered")
        except InUseError:
            answers.append("refused")

    def enter_from_a_thread():
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join(10)

    with owned(tmp_path, refuse_to_speak):
        with owned(tmp_path / ".", refuse_to_speak):
            enter_from_a_thread()
        enter_from_a_thread()
    enter_from_a_thread()
    assert answers == ["refused", "refused", "entered"]


def test_nothing_stays(tmp_path):
    with owned(tmp_path / "runs" / "empty", refuse_to_speak):
        assert (tmp_path / "runs" / "empty" / NAME).is_file()
    assert list(tmp_path.iterdir()) == []
    with owned(tmp_path / "runs" / "used", refuse_to_speak):
        (tmp_path / "runs" / "used" / "file").touch()
    assert [path.name for path in (tmp_path / "runs" / "used").iterdir()] == ["file"]


def test_a_disk_without_locks_is_named_and_used(tmp_path, monkeypatch):
    import fcntl

    def unsupported(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    said = []
    with owned(tmp_path, said.append):
        pass
    assert len(said) == 1
    assert "without locks" in said[0]


def test_an_unreadable_lock_file_still_refuses(tmp_path, other):
    (tmp_path / "run" / NAME).write_bytes(b"\xff[")
    with pytest.raises(InUseError, match="in use by another process"), owned(tmp_path / "run", refuse_to_speak):
        pass


def test_many_that_come_and_go_never_own_it_together(tmp_path):
    """The lock file is removed and made again meanwhile."""
    code = """
import sys
from pathlib import Path
from signal_reid.runtime.ownership import InUseError, owned
directory, turns = Path(sys.argv[1]), 0
while turns < 40:
    try:
        with owned(directory, print):
            (directory / "inside").mkdir()
            (directory / "inside").rmdir()
            turns += 1
    except InUseError:
        pass
"""
    (tmp_path / "kept").touch()
    started = [subprocess.Popen([sys.executable, "-c", code, tmp_path]) for _ in range(2)]
    deadline = time.monotonic() + 60
    assert [process.wait(max(0, deadline - time.monotonic())) for process in started] == [0, 0]

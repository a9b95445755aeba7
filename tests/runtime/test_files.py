"""Files are replaced whole; what is no file is written to; only one's own leftovers are removed."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from signal_reid.runtime import files
from signal_reid.runtime.files import check_writable, temporary_name, write_atomically, write_file


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_file_keeps_its_mode_and_a_new_one_has_the_process_s(tmp_path):
    old = tmp_path / "old"
    old.write_bytes(b"before")
    old.chmod(0o640)
    for path in (old, tmp_path / "new"):
        write_atomically(path, b"after")
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(old.stat().st_mode) == 0o640
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert old.read_bytes() == b"after"


def test_a_link_stays_one_and_its_file_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to("file")
    write_atomically(tmp_path / "link", b"content")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_pipe_is_written_to(tmp_path, through_a_link):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    write_file(link if through_a_link else pipe, lambda file: (file.write(b"one"), file.write(b"two"), file.tell()))
    reader.join(10)
    assert received == [b"onetwo"]
    assert pipe.is_fifo()


def test_a_device_is_written_to():
    before = os.stat("/dev/null")
    write_atomically("/dev/null", b"content")
    check_writable("/dev/null")
    assert os.path.samestat(os.stat("/dev/null"), before)


@pytest.mark.parametrize("stream", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("into_a_file", [False, True])
def test_the_process_s_own_stream_is_written_to(tmp_path, stream, into_a_file):
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("files", {files.__file__!r})
files = importlib.util.module_from_spec(spec)
sys.modules["files"] = files
spec.loader.exec_module(files)
print("said before", flush=True)
files.check_writable({stream!r})
files.write_atomically({stream!r}, b"content")
print("said after")
assert files.is_standard_output({stream!r}) and not files.is_standard_output("/dev/stderr")
"""
    output = tmp_path / "output"
    (tmp_path / "link").symlink_to("/dev/stdout")
    with output.open("wb") as file:
        stdout = file if into_a_file else subprocess.PIPE
        done = subprocess.run([sys.executable, "-c", code], stdout=stdout, check=True, cwd=tmp_path)
    assert (output.read_bytes() if into_a_file else done.stdout) == b"said before\ncontentsaid after\n"
    assert names(tmp_path) == ["link", "output"]


def test_of_what_was_left_only_one_s_own_is_removed(tmp_path, monkeypatch):
    target = tmp_path / "checkpoint.pt"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()

    def left(pid, machine=None):
        monkeypatch.setattr(os, "getpid", lambda: pid)
        if machine is not None:
            monkeypatch.setattr(files, "_machine", lambda: machine)
        path = tmp_path / temporary_name(target.name)
        path.touch()
        monkeypatch.undo()
        return path

    mine, anothers, living = left(dead.pid), left(dead.pid, "0" * 12), left(os.getppid())
    strangers = [tmp_path / name for name in ("checkpoint.pt.tmp", "checkpoint.pt.7.tmp", "other" + mine.name)]
    for path in strangers:
        path.touch()
    write_atomically(target, b"content")
    assert names(tmp_path) == sorted(path.name for path in (target, anothers, living, *strangers))


def test_two_writers_of_one_number_do_not_meet(tmp_path):
    """As in two containers that share a disk: each file is whole, and is one of the two."""
    target, inside = tmp_path / "file", []

    def write_slowly(file):
        file.write(b"first")
        write_atomically(target, b"second")
        inside.append(target.read_bytes())
        file.write(b", whole")

    write_file(target, write_slowly)
    assert inside == [b"second"]
    assert target.read_bytes() == b"first, whole"
    assert names(tmp_path) == ["file"]


def test_a_name_of_any_length_and_bytes_is_written(tmp_path):
    for name in ("x" * 255, os.fsdecode(b"\xff\xfe"), "\N{GREEK SMALL LETTER ALPHA}" * 120):
        write_atomically(tmp_path / name, b"content")
        assert (tmp_path / name).read_bytes() == b"content"
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize(
    ("path", "error"), [("missing/file", FileNotFoundError), (".", IsADirectoryError), ("file/below", OSError)]
)
def test_what_cannot_be_written_is_found_out_before_the_work(tmp_path, path, error):
    (tmp_path / "file").touch()
    for attempt in (check_writable, lambda where: write_atomically(where, b"")):
        with pytest.raises(error, match=str(tmp_path)):
            attempt(tmp_path / path)


def test_checking_leaves_nothing_and_changes_nothing(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"before")
    check_writable(target)
    check_writable(Path(tmp_path, "new"))
    assert names(tmp_path) == ["file"]
    assert target.read_bytes() == b"before"


@pytest.mark.parametrize("name", ["file", "stream"])
def test_an_error_of_a_file_that_is_read_meanwhile_names_that_file(name, tmp_path):
    os.mkfifo(tmp_path / "stream")
    reader = os.open(tmp_path / "stream", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(FileNotFoundError) as caught:
        write_file(tmp_path / name, lambda file: file.write((tmp_path / "gone").read_bytes()))
    os.close(reader)
    assert str(caught.value) == f"[Errno 2] No such file or directory: '{tmp_path / 'gone'}'"
    assert names(tmp_path) == ["stream"]


def test_checking_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    open_ = Path.open

    def open_and_interrupt(path, *arguments):
        open_(path, *arguments).close()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "open", open_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        check_writable(tmp_path / "file")
    assert names(tmp_path) == []


def test_a_disk_that_refuses_is_found_out_before_the_work(tmp_path, monkeypatch):
    def refuse(self, *_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError, match=r"Read-only file system.*/file'"):
        check_writable(tmp_path / "file")

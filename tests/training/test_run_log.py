"""What a run says about itself while it works: its log, and how long it still takes."""

import re
import socket

import pytest
from rich.console import Console
from rich.table import Table

from signal_reid.cli.train import told_how_to_go_on
from signal_reid.runtime.console import make_console, progress_bar
from signal_reid.runtime.errors import InputError
from signal_reid.training import outlook
from signal_reid.training.outlook import Outlook, in_words
from signal_reid.training.run_directory import RunDirectory
from signal_reid.training.run_log import logged


@pytest.fixture
def run(tmp_path):
    """A directory that holds a run."""
    (tmp_path / "config.yml").write_text("")
    return RunDirectory(tmp_path)


def lines(run):
    """The log without its times."""
    text = run.log.read_text()
    times = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d  "
    assert all(re.match(times, line) for line in text.splitlines())
    return [re.sub(times, "", line) for line in text.splitlines()]


def test_the_log_says_when_where_by_which_command_and_what_was_shown(run, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/signal-reid", "train", "--config", "a b.yml"])
    console, results = make_console(quiet=True), Console(quiet=True)
    with logged(run, console, results), logged(run, console):  # a training inside a demo
        console.print("two\nlines \x1b[2J")
        with progress_bar("epoch 1/3", console) as show:
            show(1, 2)
        table = Table("mAP")
        table.add_row("61.0%")
        results.print(table)
    first, versions, *said = lines(run)
    assert first.startswith(f"signal-reid train --config 'a b.yml' on {socket.gethostname()}, process ")
    assert versions.startswith("signal-reid ")
    assert "torch " in versions
    assert said[:2] == ["two", "lines \\x1b[2J"]
    assert any("61.0%" in line for line in said)
    assert said[-1] == "ended"
    assert not any("epoch 1/3" in line for line in said)
    assert "print" not in vars(console)


def speak_and_fail(run, error):
    console = make_console(quiet=True)
    with logged(run, console):
        console.print("epoch 1")
        raise error


def test_the_log_says_how_a_run_ended(run):
    for error, end in {
        InputError("training diverged"): "ended: training diverged",
        KeyboardInterrupt(): "interrupted",
        ZeroDivisionError("a fault"): "ZeroDivisionError: a fault",
    }.items():
        with pytest.raises(type(error)):
            speak_and_fail(run, error)
        assert lines(run)[-1] == end


def test_what_did_not_begin_leaves_no_trace(run, tmp_path):
    with pytest.raises(InputError), logged(run, make_console(quiet=True)):
        raise InputError("already holds a run")
    assert not run.log.exists()
    console, nothing = make_console(quiet=True), RunDirectory(tmp_path / "nothing")
    with logged(nothing, console):
        console.print("decoding")
    assert not nothing.path.exists()


def test_ctrl_c_is_answered_with_the_command_that_goes_on(tmp_path, capsys):
    run = RunDirectory(tmp_path / "a run")
    with pytest.raises(KeyboardInterrupt), told_how_to_go_on(run):
        raise KeyboardInterrupt
    assert "interrupted before the first checkpoint" in capsys.readouterr().err
    run.path.mkdir()
    run.checkpoint.touch()
    with pytest.raises(KeyboardInterrupt), told_how_to_go_on(run):
        raise KeyboardInterrupt
    assert f"signal-reid train --resume '{run.path}' goes on" in capsys.readouterr().err


def test_the_rest_of_a_run_takes_as_long_as_its_part_so_far(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(outlook.time, "monotonic", lambda: now[0])
    expected = Outlook(epochs=11)
    assert expected.left(1, 0.5) is None
    now[0] += 60
    assert expected.left(2, 0.5) == "9 min 30 s left"
    assert expected.line_due()
    assert not expected.line_due()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (3600, "1 h 00 min"), (100_000, "27 h 46 min"), (250_000, "2 days 21 h")]
)
def test_a_duration_has_two_units(seconds, words):
    assert in_words(seconds) == words

"""What is shown is one line of what can be seen."""

import pytest

from signal_reid.data.errors import Problem
from signal_reid.runtime.console import make_console
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.text import escaped, is_plain, read_json, shortened, shown


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("plain name.jpg", "plain name.jpg"),
        ("\u732b.jpg", "\u732b.jpg"),
        ("a\nb", r"a\nb"),
        ("\x1b[2J", r"\x1b[2J"),
        ("caf\udce9", r"caf\udce9"),
        ("\u202egpj", r"\u202egpj"),
        ("a\u2028b", r"a\u2028b"),
        ("\\n", "\\n"),
        ("\x9b2J", r"\x9b2J"),
    ],
)
def test_what_cannot_be_seen_is_escaped(name, seen, capsys):
    assert escaped(name) == seen
    assert is_plain(name) == (name == seen)
    assert str(Problem(name, "is odd")) == f"{seen}: is odd"
    assert str(InputError(f"{name}: no image")) == f"{seen}: no image"
    make_console().print(f"{name} read\n")
    assert capsys.readouterr().err.rstrip() == (f"{name} read" if name == "a\nb" else f"{seen} read")


def test_any_value_is_shown_in_one_bounded_line():
    deep = [[[[[[]]]]]]
    for value in ("x" * 10**6, 10**5000, list(range(10**5)), deep, {"a" * 1000: "\n" * 1000}, "\x1b", float("nan")):
        assert shown(value).isprintable()
        assert len(shown(value)) < 200


def test_a_value_that_holds_itself_is_shown():
    cycle = []
    cycle.append(cycle)
    assert shown(cycle) == "[[[[...]]]]"


def test_a_long_text_is_shortened():
    assert shortened("x" * 500) == "x" * 120 + "... (500 characters)"
    assert shortened("x" * 500, 500) == "x" * 500


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, b"\xff", "", "{"])
def test_damaged_json_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"\S"):
        read_json(text)

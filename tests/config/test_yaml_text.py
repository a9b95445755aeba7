"""YAML is read within budgets, each key once, and whatever else it holds is one line of an error."""

import os
import subprocess
import sys

import pytest

from signal_reid.config import ConfigError, load_config
from signal_reid.config.yaml_text import LONGEST, read_yaml

BILLION_LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
MERGES = "a0: &a0 {x0: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], x{n}: 1}}\n" for n in range(1, 30))

REFUSED = {
    "nested aliases": (BILLION_LAUGHS, "more than 20000 values"),
    "nested merges": (MERGES, "more than 20000 values"),
    "cycle": ("a: &a [*a]", "an alias of what it stands in"),
    "cycle of mappings": ("a: &a {b: *a}", "an alias of what it stands in"),
    "deep": ("a: " + "[" * 100_000, "more than 20 levels"),
    "deep mapping": ("{a: " * 50_000, "more than 20 levels"),
    "deep blocks": ("".join(" " * n + "a:\n" for n in range(30)), "more than 20 levels"),
    "100,000 unknown keys": ("".join(f"k{n}: 1\n" for n in range(100_000)), "more than 20000 values"),
    "long": ("a: " + "x" * LONGEST, "longer than any configuration"),
    "duplicate": ("data: {root: a}\noutput: b\noutput: c", "line 3 is not valid YAML: the key output stands twice"),
    "duplicate inside": ("data: {root: a, root: a}", "the key root stands twice"),
    "tag on a word": ("a: !!bool x", "not valid YAML"),
    "tag on a date": ("a: !!timestamp x", "not valid YAML"),
    "tag on a list": ("a: !!int [1]", "not valid YAML"),
    "tag on a text": ("a: !!set x", "not valid YAML"),
    "bad bytes": ("a: !!binary \u20ac", "not valid YAML"),
    "python": ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
    "long number": ("a: " + "9" * 5000, "a number of 5000 characters"),
    "long hexadecimal": ("a: 0x" + "f" * 5000, "a number of 5002 characters"),
    "minutes of minutes": ("a: 1" + ":1" * 5000, "a number of 10001 characters"),
    "unknown alias": ("a: *b", "undefined alias"),
    "control character": ("a: \x1b[2J", "unacceptable character"),
    "date": ("a: 2024-13-01", "month must be in 1..12"),
    "list as a key": ("? [a]\n: 1", "unhashable key"),
    "latin-1": ("a: \u00e9".encode("latin-1"), "not a text file in UTF-8"),
    "UTF-16": ("a: 1".encode("utf-16"), "not a text file in UTF-8"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_configuration_needs_is_one_line(kind, tmp_path):
    content, reason = REFUSED[kind]
    path = tmp_path / "config.yml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert message.isprintable()
    assert len(message) < len(str(path)) + 200


def test_aliases_and_merges_are_read():
    text = "base: &b {x: 1, y: 2}\nother: {<<: *b, y: 3}\nagain: *b\nthird: {<<: *b, y: 4}"
    base = {"x": 1, "y": 2}
    assert read_yaml(text) == {"base": base, "other": base | {"y": 3}, "again": base, "third": base | {"y": 4}}


def test_a_byte_order_mark_is_no_part_of_a_key():
    assert read_yaml(b"\xef\xbb\xbfoutput: a") == {"output": "a"}


@pytest.mark.parametrize("literal", ["-" * 50_000 + "1", "(" * 50_000, "[" * 900, "-" * 900 + "1", "9" * 900])
def test_the_authors_literals_may_be_of_any_length(literal, tmp_path):
    path = tmp_path / "authors.yml"
    path.write_text(f"SOLVER:\n  MAX_EPOCHS: '{literal}'\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", ["x" * 5000, "\x1b[2J", "a\nb"])
def test_a_value_is_shown_in_one_line_of_bounded_length(value):
    for values in ({"output": 1, value: 2}, {"schedule": {"epochs": value}}, {"MODEL": {value: 1}}, {"TEST": value}):
        with pytest.raises(ConfigError) as caught:
            load_config(values)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


def test_a_path_that_is_not_utf_8_survives_the_resolved_configuration():
    config = load_config("rgbnt201", ["data.root=/data/caf\udce9"])
    from signal_reid.config import dump_config

    assert dump_config(config).isascii()
    assert load_config(read_yaml(dump_config(config))) == config


def test_a_configuration_is_utf_8_whatever_the_locale(tmp_path):
    path = tmp_path / "config.yml"
    path.write_bytes("output: r\u00e9sultats\n".encode())
    program = (
        "import sys; from signal_reid.config.yaml_text import read_yaml; "
        "print(ascii(read_yaml(open(sys.argv[1], 'rb').read())))"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", program, path], env=environment, capture_output=True, text=True)
    assert done.stdout == "{'output': 'r\\xe9sultats'}\n", done.stderr

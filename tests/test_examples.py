"""Every example runs to its end, in this process, which has imported what most of their time would go to."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, tmp_path, monkeypatch, capsys):
    takes_a_directory = "[DIRECTORY]" in example.read_text()
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(example), *([str(tmp_path / "made")] if takes_a_directory else [])])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out

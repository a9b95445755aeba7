"""Every benchmark begins with the question that it answers, in its file and in its help."""

import ast

import pytest

SCRIPTS = ("compare", "dataloading", "evaluation", "metrics", "modules", "ops", "scaling", "search", "train_step")


def test_every_script_is_listed_here(benchmarks_directory):
    assert tuple(sorted(path.stem for path in benchmarks_directory.glob("*.py"))) == SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_help_is_the_question_that_the_file_begins_with(script, benchmarks_directory, name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    question = ast.get_docstring(ast.parse((benchmarks_directory / f"{name}.py").read_text())).splitlines()[0]
    assert question.startswith(("How", "What", "Is"))
    assert question.endswith("?")
    with pytest.raises(SystemExit) as stopped:
        script(name).main(["--help"])
    assert stopped.value.code == 0
    assert question in capsys.readouterr().out

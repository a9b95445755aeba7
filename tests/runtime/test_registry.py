"""Plug-ins: what is built in, what is installed, and one line for each that cannot be used."""

import sys

import pytest

from signal_reid.runtime.errors import InputError, UserError
from signal_reid.runtime.registry import Registry


@pytest.fixture
def animals(tmp_path, monkeypatch):
    """A package with a file, a folder and a shared file, on the path; `install` adds a distribution beside it."""
    package = tmp_path / "animals"
    (package / "cat").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "base.py").write_text("raise AssertionError('imported without being asked for')\n")
    (package / "dog.py").write_text("ANIMAL: str = 'dog'\n")
    (package / "cat" / "__init__.py").write_text("def __getattr__(name):\n    return {'ANIMAL': 'cat'}[name]\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield Registry("zoo.animals", "animals", "ANIMAL")
    for name in [name for name in sys.modules if name.partition(".")[0] == "animals"]:
        del sys.modules[name]


@pytest.fixture
def install(tmp_path):
    def write(distribution, entry, source=None):
        information = tmp_path / f"{distribution}-1.2.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (information / "entry_points.txt").write_text(f"[zoo.animals]\n{entry}\n")
        if source is not None:
            (tmp_path / f"{entry.partition('=')[2].partition(':')[0].strip()}.py").write_text(source)

    return write


def test_files_that_assign_the_attribute_and_folders_are_built_in(animals):
    assert animals.names() == ("cat", "dog")
    assert [animals.get(name) for name in animals.names()] == ["cat", "dog"]


def test_nothing_is_imported_before_it_is_asked_for(animals, install):
    install("plug", "emu = plugged_emu:BIRD", "raise AssertionError('imported')\n")
    assert animals.names() == ("cat", "dog", "emu")
    animals.get("dog")
    assert "plugged_emu" not in sys.modules
    assert "animals.cat" not in sys.modules


def test_an_installed_plug_in_is_found(animals, install):
    install("plug", "owl = plugged_owl:BIRD", "BIRD = 'owl'\n")
    assert animals.get("owl") == "owl"


def assert_refused(animals, name, *words):
    with pytest.raises(InputError) as raised:
        animals.get(name)
    assert isinstance(raised.value, (UserError, ValueError))
    assert "\n" not in str(raised.value)
    assert all(word in str(raised.value) for word in words), raised.value


def test_an_unknown_name_is_answered_with_what_there_is(animals, install):
    install("plug", "owl = plugged_owl:BIRD", "BIRD = 'owl'\n")
    assert_refused(animals, "cow", "animal must be one of cat, dog, owl, got 'cow'")


def test_a_plug_in_that_fails_to_import_says_which_and_why(animals, install):
    install("broken", "hen = plugged_hen:BIRD", "import nothing_of_this_name\n")
    assert_refused(animals, "hen", "plugged_hen:BIRD", "broken 1.2", "nothing_of_this_name")


def test_a_plug_in_without_the_object_that_it_names_says_so(animals, install):
    install("empty", "jay = plugged_jay:BIRD", "")
    assert_refused(animals, "jay", "plugged_jay:BIRD", "empty 1.2", "BIRD")


def test_a_plug_in_that_takes_a_built_in_name_is_refused(animals, install):
    install("cuckoo", "dog = plugged_dog:BIRD", "BIRD = 'cuckoo'\n")
    assert_refused(animals, "dog", "dog is built in", "cuckoo 1.2")
    assert animals.get("cat") == "cat"


def test_two_plug_ins_of_one_name_are_refused(animals, install):
    install("one", "owl = plugged_one:BIRD", "BIRD = 1\n")
    install("two", "owl = plugged_two:BIRD", "BIRD = 2\n")
    assert_refused(animals, "owl", "one 1.2", "two 1.2")


def test_a_folder_without_the_attribute_is_named(animals, tmp_path):
    (tmp_path / "animals" / "cat" / "__init__.py").write_text("")
    assert_refused(animals, "cat", "animals.cat offers no ANIMAL")

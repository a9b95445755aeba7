"""Benchmarks are scripts, not a package: they are imported as when run from their directory."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def benchmarks_directory():
    return BENCHMARKS


@pytest.fixture
def script(monkeypatch):
    """Import a script by its name; what it brings into `sys.modules` goes again."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = {"harness", *(path.stem for path in BENCHMARKS.glob("*.py"))}

    yield importlib.import_module

    for name in list(sys.modules):
        if name.split(".")[0] in names:
            del sys.modules[name]

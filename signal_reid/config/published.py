"""The configurations that come with the methods: `NAME.yml` in a method's folder."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from signal_reid.config.types import DEFAULT_METHOD


def published(name: str) -> Path | None:
    """The published configuration `NAME` of the default method or `METHOD/NAME` of any; none where there is none."""
    from signal_reid.methods.registry import METHODS  # which imports the schema

    method, slash, stem = name.rpartition("/")
    if (slash and method not in METHODS.names()) or not stem.isidentifier():
        return None
    file = _folder(method or DEFAULT_METHOD) / f"{stem}.yml"
    return file if file.is_file() else None


def published_names() -> list[str]:
    """What `published` finds; the default method's by their bare names."""
    from signal_reid.methods.registry import METHODS

    names = []
    for method in METHODS.names():
        prefix = "" if method == DEFAULT_METHOD else f"{method}/"
        names += [prefix + file.stem for file in sorted(_folder(method).glob("*.yml"))]
    return names


def _folder(method: str) -> Path:
    """The folder of a method's package; of a plug-in that is a single file, a folder of the file's name beside it."""
    from signal_reid.methods.registry import METHODS

    module = METHODS.module(method)
    try:
        spec = find_spec(module) if module is not None else None
    except ImportError:  # a plug-in whose package is not there
        spec = None
    if spec is None or spec.origin is None:
        return Path(method)
    return Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin).with_suffix("")

"""What a setting means: the text below it in its class, what it may be, and its default."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from signal_reid.config.loading import ConfigError, is_section, unknown_key
from signal_reid.config.types import config_type

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Explanation:
    """One setting, in words."""

    key: str
    meaning: str
    """The text below it in its class; for a section that of the class itself."""
    allowed: str
    """What it may be."""
    default: Any
    """What it is where nobody says anything."""


def explain_settings(key: str = "", method: str | None = None, backbone: str | None = None) -> list[Explanation]:
    """Explain a setting, or every setting of a section.

    Args:
        key: dotted, such as `training.precision` or `training`; empty: all settings.
        method, backbone: whose settings `model` and `losses` are; by default Signal's on CLIP's vision transformer.

    Raises:
        ConfigError: there is no such setting; the nearest one is named.
    """
    settings = config_type(method, backbone)
    found = [it for it in _explained(settings) if not key or it.key == key or it.key.startswith(f"{key}.")]
    if not found:
        raise ConfigError(unknown_key(key, settings))
    return found


def _explained(section: type[BaseModel], prefix: str = "") -> Iterator[Explanation]:
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            yield from _explained(field.annotation, f"{prefix}{name}.")
        else:
            meaning = next((texts[name] for base in section.__mro__ if name in (texts := _texts(base))), "")
            default = None if field.is_required() else field.default
            yield Explanation(f"{prefix}{name}", meaning, _allowed(field), default)


@cache
def _texts(section: type) -> dict[str, str]:
    """The text below each setting of a class; nothing of a class whose source is not there, as one that is composed."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return {}
    texts, name = {}, None
    for statement in getattr(tree, "body", []):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and name is not None:
            texts[name] = " ".join(str(statement.value.value).split())
            name = None
        else:
            name = None
    return texts


def _allowed(field: FieldInfo) -> str:
    bounds = [
        f"{words} {getattr(limit, bound):g}"
        for limit in field.metadata
        for bound, words in _BOUNDS.items()
        if getattr(limit, bound, None) is not None
    ]
    return ", ".join([_kind(field.annotation), *bounds])


def _kind(annotation: Any) -> str:
    if annotation in _KINDS:
        return _KINDS[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin in (Union, UnionType):
        kinds = [_kind(argument) for argument in arguments if argument is not NoneType]
        return " or ".join([*kinds, *(["null"] if NoneType in arguments else [])])
    if origin is tuple:
        each = _kind(arguments[0]).removeprefix("a ")
        return f"a list, each {each}" if Ellipsis in arguments else f"a list of {len(arguments)}, each {each}"
    if origin is dict:
        return f"a mapping of names, each to {_kind(arguments[1])}"
    return _kind(arguments[0]) if arguments else str(annotation)

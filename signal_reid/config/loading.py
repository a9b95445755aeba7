"""Reads configurations: YAML in, typed settings out, `key=value` overrides in our names or the authors'."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from signal_reid.config.published import published, published_names
from signal_reid.config.schema import Config
from signal_reid.config.types import config_type
from signal_reid.config.yaml_text import DEEPEST, YamlError, read_yaml
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.text import shortened, shown
from signal_reid.upstream import configuration as upstream_config


class ConfigError(InputError):
    """A configuration that cannot be used; the message is one line naming the key."""


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        source: a published name (`rgbnt201`, `METHOD/NAME` for another method than Signal), a YAML file in our naming
            or in the authors' upper-case naming, or a mapping of either kind.
        overrides: `key=value` strings applied on top, in either naming (`schedule.epochs=2`, `SOLVER.MAX_EPOCHS=2`):
            first all of the authors', taken together, then ours in order.

    Raises:
        ConfigError: an unknown key (the nearest valid one is named), an ill-typed value, or values that do not fit
            together.
        FileNotFoundError: no such file, and no published configuration of that name.
    """
    values = _text_keys(source if isinstance(source, Mapping) else _read(source))
    given = [override.partition("=") for override in overrides]
    theirs = {key: text for key, equals, text in given if equals and upstream_config.is_upstream(key)}
    theirs = {key: text if key in upstream_config.TEXT_KEYS else _yaml_value(text) for key, text in theirs.items()}
    if _is_upstream(values):
        values = _from_upstream(lambda: upstream_config.convert_file(values, theirs))
    else:
        values = _merge(values, _from_upstream(lambda: upstream_config.convert(theirs)))
    settings = _settings_of(values, {key: text for key, _, text in given})
    for override in overrides:
        key, value = _parse_override(override, settings)
        if key not in theirs:
            values = _merge(values, _nested(key, value))
    return _validate(values, settings)


def dump_config(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None)


def flat_settings(config: Config) -> dict[str, Any]:
    """Every setting by its dotted key, as an override names it."""
    return _flat(config.model_dump())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if (name := published(str(source))) is not None:
        content = name.read_bytes()
    elif path.is_file():
        content = path.read_bytes()
    else:
        raise FileNotFoundError(
            f"config: no file {source!s} and no published configuration of that name "
            f"(published: {', '.join(published_names())})"
        )
    try:
        values = read_yaml(content)
    except YamlError as error:
        raise ConfigError(f"{source}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: a configuration is a mapping of keys, got {type(values).__name__}")
    return values


def _text_keys(values: Mapping[Any, Any], level: int = 1) -> dict[str, Any]:
    """Keys that YAML reads as numbers or dates become text, so that they are named as unknown."""
    if level > DEEPEST:  # one made in Python may even hold itself
        raise ConfigError(f"the configuration has more than {DEEPEST} levels")
    return {
        str(key): _text_keys(value, level + 1) if isinstance(value, Mapping) else value for key, value in values.items()
    }


def _is_upstream(values: Mapping[str, Any]) -> bool:
    theirs = [key for key in values if upstream_config.is_upstream(key)]
    ours = [key for key in values if key in Config.model_fields]
    if theirs and ours:
        raise ConfigError(
            f"{ours[0]} and {shortened(theirs[0])}: a file uses either our keys or the authors', not both"
        )
    return bool(theirs)


def _settings_of(values: Mapping[str, Any], overrides: Mapping[str, str]) -> type[Config]:
    """The configuration's class for the method and the backbone that are asked for; overrides win over the file."""
    model = values.get("model") or {}
    backbone = (model.get("backbone") or {}) if isinstance(model, Mapping) else {}
    names = {
        "model.method": model.get("method") if isinstance(model, Mapping) else None,
        "model.backbone.name": backbone.get("name") if isinstance(backbone, Mapping) else None,
    }
    method, name = (str(overrides.get(key, value)) for key, value in names.items())
    try:
        return config_type(None if method == "None" else method, None if name == "None" else name)
    except InputError as error:
        raise ConfigError(f"model: {shortened(str(error), 400)}") from error


def _validate(values: Mapping[str, Any], settings: type[Config]) -> Config:
    try:
        return settings.model_validate(_numbers(values, settings))
    except ValidationError as error:
        raise ConfigError(_first_problem(error, settings)) from None


def is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    """Whether a setting is a section of settings; to Python 3.10, `tuple[int, int]` is a type and has no bases."""
    return get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _numbers(values: Any, section: type[BaseModel]) -> Any:
    """Read `5e-6`, which YAML 1.1 takes for a string, and whole numbers given for fractions, as floats."""
    if not isinstance(values, Mapping):
        return values
    result = {}
    for key, value in values.items():
        field = section.model_fields.get(key)
        annotation = field.annotation if field else None
        if is_section(annotation):
            value = _numbers({} if value is None else value, annotation)
        elif annotation is float or float in get_args(annotation):
            value = [_float(item) for item in value] if isinstance(value, (list, tuple)) else _float(value)
        result[key] = value
    return result


def _float(value: Any) -> Any:
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    return value


def _first_problem(error: ValidationError, settings: type[Config]) -> str:
    problem, *others = error.errors(include_url=False)
    key = _setting_of(problem["loc"], settings)
    if problem["type"] == "extra_forbidden":
        return unknown_key(key, settings)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return shortened(f"{key}.{message}" if key else message, 400)
    for other in others:  # a setting of several kinds has a problem with each of them
        if _setting_of(other["loc"], settings) == key:
            message += f" or {other['msg'].removeprefix('Input should be ')}"
    return f"{key}: {message[0].lower()}{message[1:]}, got {shown(problem['input'])}"


def _setting_of(location: tuple[int | str, ...], settings: type[Config]) -> str:
    """The dotted key of a problem, without what it says of the kinds of value that a setting may have."""
    parts: list[str] = []
    section: Any = settings
    for part in map(str, location):
        parts.append(part)
        if not is_section(section) or part not in section.model_fields:
            break
        section = section.model_fields[part].annotation
        if not is_section(section):
            break
    return ".".join(parts)


_NAMES_ELSEWHERE = {
    "lr": "optimizer.base_rate",
    "learning_rate": "optimizer.base_rate",
    "batch": "data.batch_size",
    "amp": "training.precision",
    "gpu": "training.device",
}
"""What other programs call our settings."""


def unknown_key(key: str, settings: type[Config]) -> str:
    """The line of an error for a key that is no setting's, with the nearest one."""
    known = upstream_config.KEYS if upstream_config.is_upstream(key) else tuple(_leaf_keys(settings))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
    tail = key.rsplit(".", 1)[-1]
    same_name = [name for name in known if name.rsplit(".", 1)[-1] == tail]
    elsewhere = _NAMES_ELSEWHERE.get(tail)
    nearest = same_name[0] if same_name else elsewhere or (near[0] if near else None)
    return f"unknown key {shortened(key)}" + (f"; the nearest valid key is {nearest}" if nearest else "")


def _leaf_keys(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every setting's dotted key and annotation."""
    keys: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            keys |= _leaf_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys[f"{prefix}{name}"] = field.annotation
    return keys


def _parse_override(override: str, settings: type[Config]) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"an override must read key=value, got {shown(override)}")
    if upstream_config.is_upstream(key):
        return key, text
    annotations = _leaf_keys(settings)
    if key not in annotations:
        raise ConfigError(unknown_key(key, settings))
    kinds = get_args(annotations[key])
    if type(None) in kinds and text in upstream_config.NONE:
        return key, None
    takes_text = any(kind is str or isinstance(kind, str) for kind in (annotations[key], *kinds))
    return key, text if takes_text else _yaml_value(text)


def _yaml_value(text: str) -> Any:
    try:
        return read_yaml(text) if text else ""
    except YamlError:
        return text


def _from_upstream(convert: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Nest the authors' keys once converted, their errors in our form."""
    try:
        dotted = convert()
    except KeyError as error:
        raise ConfigError(unknown_key(error.args[0], Config)) from None
    except ValueError as error:
        raise ConfigError(shortened(str(error), 400)) from None
    values: dict[str, Any] = {}
    for key, value in dotted.items():
        values = _merge(values, _nested(key, value))
    return values


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged

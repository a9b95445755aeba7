"""Plug-ins by name: the modules of a package, and what installed distributions offer under an entry-point group."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any

from signal_reid.runtime.errors import InputError


class Registry:
    """Everything of one kind that can be asked for by name; nothing is imported before it is asked for.

    Built in are the folders of a package, and those of its files that assign the attribute at their top level: adding
    one means adding a folder or a file. Installed plug-ins are entry points, whose value is the object itself.

    Args:
        group: of the entry points.
        package: dotted name of the package that holds the built-in ones.
        attribute: what each of its modules calls the object that it offers.
        kind: the word for one of them in errors; by default the attribute in lower case.
    """

    def __init__(self, group: str, package: str, attribute: str, kind: str | None = None) -> None:
        self.group = group
        self.package = package
        self.attribute = attribute
        self.kind = kind or attribute.lower()

    def names(self) -> tuple[str, ...]:
        """Built-in and installed names, sorted."""
        return tuple(sorted({*self._built_in, *self._installed}))

    def built_in_names(self) -> tuple[str, ...]:
        """Built-in names, sorted."""
        return tuple(sorted(self._built_in))

    def module(self, name: str) -> str | None:
        """The dotted name of the module that offers `name`, which is not imported; none where there is no such name."""
        if name in self._built_in:
            return f"{self.package}.{name}"
        offers = self._installed.get(name, [])
        return offers[0].module if offers else None

    def get(self, name: str) -> Any:
        """Import what has this name.

        Raises:
            InputError: there is no such name, a plug-in takes a name that is taken, or it cannot be imported.
        """
        offers = self._installed.get(name, [])
        takers = [_described(offer) for offer in offers]
        if name in self._built_in:
            if takers:
                raise InputError(
                    f"{self.kind} {name} is built in, and {takers[0]} takes its name; uninstall or rename it"
                )
            return self._attribute_of(name)
        if not takers:
            raise InputError(f"{self.kind} must be one of {', '.join(self.names())}, got {name!r}")
        if len(takers) > 1:
            raise InputError(f"{self.kind} {name} is offered by {' and by '.join(takers)}; uninstall or rename one")
        try:
            return offers[0].load()
        except Exception as error:  # a plug-in is free to fail in any way
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"{self.kind} {name}: {takers[0]} cannot be imported ({reason})") from error

    def _attribute_of(self, name: str) -> Any:
        module = importlib.import_module(f"{self.package}.{name}")
        if not hasattr(module, self.attribute):
            raise InputError(f"{self.kind} {name}: {module.__name__} offers no {self.attribute}")
        return getattr(module, self.attribute)

    @cached_property
    def _built_in(self) -> frozenset[str]:
        spec = find_spec(self.package)
        paths = spec.submodule_search_locations if spec is not None else None
        modules = pkgutil.iter_modules(paths or [])
        return frozenset(module.name for module in modules if module.ispkg or self._is_assigned_in(module))

    def _is_assigned_in(self, module: pkgutil.ModuleInfo) -> bool:
        """Whether a file's own text assigns the attribute, so that files shared by the built-in ones are told apart."""
        spec = module.module_finder.find_spec(module.name, None)
        get_source = getattr(spec.loader, "get_source", None) if spec is not None else None
        source = get_source(module.name) if get_source is not None else None
        return source is not None and self.attribute in _assigned(source)

    @cached_property
    def _installed(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for offer in sorted(entry_points(group=self.group), key=lambda offer: (offer.name, offer.value)):
            offers = found.setdefault(offer.name, [])
            if offer.value not in (
                other.value for other in offers
            ):  # a path that is listed twice shows a plug-in twice
                offers.append(offer)
        return found


def _assigned(source: str) -> Iterator[str]:
    for statement in ast.parse(source).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def _described(offer: EntryPoint) -> str:
    distribution = f" of {offer.dist.name} {offer.dist.version}" if offer.dist is not None else ""
    return f"the plug-in {offer.value}{distribution}"

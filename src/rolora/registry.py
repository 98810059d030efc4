"""Factories by name: those of rolora, and those that installed packages add.

A package adds one with an entry point in its ``pyproject.toml``::

    [project.entry-points."rolora.methods"]
    my_method = "my_package.my_method:method"
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from inspect import Parameter, signature
from typing import Any

from rolora.errors import ConfigError, nearest


def attributes(package: str, modules: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """``Registry.own`` of factories that are called as their entries: module -> names in it."""
    return {
        name: f"{package}.{module}:{name}" for module, names in modules.items() for name in names
    }


@dataclass(frozen=True)
class Registry:
    """Factories by name; each is imported when it is first asked for.

    ``kind`` is what messages call an entry, such as "method". ``group`` is the entry-point group of
    other packages. ``own`` maps the names that come with rolora to "module:attribute".
    """

    kind: str
    group: str
    own: Mapping[str, str]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({*self.own, *self._added()})

    def factory(self, name: str) -> Callable[..., Any]:
        """The factory of this name.

        Raises ConfigError if there is none, or if a package adds one under a name of rolora's.
        """
        added = self._added()
        if name not in self.own and name not in added:
            raise ConfigError(f"unknown {self.kind} {name!r}: {nearest(name, self.names())}")
        if name in self.own and name in added:
            raise ConfigError(
                f"{added[name].value} adds a {self.kind} {name!r}, but rolora has one of that name"
            )
        module, _, attribute = (self.own.get(name) or added[name].value).partition(":")
        try:
            found: Callable[..., Any] = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            if name in self.own:
                raise
            raise ConfigError(
                f"{self.kind} {name!r}: {added[name].value} does not load: {error}"
            ) from error
        return found

    def options(self, name: str) -> dict[str, Parameter]:
        """The options of this factory: its keyword-only parameters."""
        parameters = signature(self.factory(name)).parameters
        return {key: one for key, one in parameters.items() if one.kind is Parameter.KEYWORD_ONLY}

    def make(self, name: str, *given: Any, **options: Any) -> Any:
        """What this factory makes. ConfigError for an unknown name or option."""
        known = self.options(name)
        for option in options.keys() - known:
            hint = nearest(option, known) if known else "it has no options"
            raise ConfigError(f"{self.kind} {name!r} has no option {option!r}: {hint}")
        return self.factory(name)(*given, **options)

    def _added(self) -> Mapping[str, EntryPoint]:
        return _entry_points(self.group, tuple(sys.path))


@cache
def _entry_points(group: str, path: tuple[str, ...]) -> Mapping[str, EntryPoint]:
    """The entry points of the packages on this path, by name."""
    return {point.name: point for point in entry_points(group=group)}

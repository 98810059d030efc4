"""Names to factories: those that come with rolora, and those that installed packages add.

A package adds one by an entry point in its ``pyproject.toml``::

    [project.entry-points."rolora.methods"]
    my_method = "my_package.my_method:method"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from rolora.errors import ConfigError, nearest


@dataclass(frozen=True)
class Registry:
    """Factories by name. Nothing is imported before it is asked for.

    ``kind`` is what messages call an entry, such as "method"; ``group`` the entry points of other
    packages; ``own`` maps the names of ours to "module:attribute".
    """

    kind: str
    group: str
    own: Mapping[str, str]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({*self.own, *self._added()})

    def factory(self, name: str) -> Callable[..., Any]:
        """The factory of this name. ConfigError if there is none, or another package repeats it."""
        added = self._added()
        if name not in self.own and name not in added:
            raise ConfigError(f"unknown {self.kind} {name!r}: {nearest(name, self.names())}")
        if name in self.own and name in added:
            raise ConfigError(
                f"{added[name].value} adds a {self.kind} {name!r}, a name of rolora itself"
            )
        where = self.own.get(name) or added[name].value
        module, _, attribute = where.partition(":")
        found: Callable[..., Any] = getattr(import_module(module), attribute)
        return found

    def _added(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

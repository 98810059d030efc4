"""One file here is one method, under its file name; installed packages may add others.

A method file has a docstring that cites its paper and a function ``method(*, option=default, ...)``
that returns a ``rolora.algorithm.method.Method``. Its options become the keys of ``[method]``.
"""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING, Any

from rolora.registry import Registry

if TYPE_CHECKING:
    from rolora.algorithm.method import Method

METHODS = Registry(
    kind="method",
    group="rolora.methods",
    own={file.name: f"{__name__}.{file.name}:method" for file in pkgutil.iter_modules(__path__)},
)


def method_names() -> list[str]:
    """The names of all methods, sorted."""
    return METHODS.names()


def get_method(name: str, **options: Any) -> Method:
    """The method of this name with these options.

    >>> rolora = get_method("rolora", first="B")
    >>> [sorted(rolora.shared(round) - {"head"}) for round in (1, 2, 3)]
    [['B'], ['A'], ['B']]

    Raises ConfigError for an unknown name or option, naming the nearest one.
    """
    method: Method = METHODS.make(name, **options)
    return method

"""What the methods are, in a table that is read off the methods themselves."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass

from rolora.adapter import Roles
from rolora.method import get_method, method_factory, method_names


@dataclass(frozen=True)
class MethodRow:
    """One method: what it trains and sends in rounds 1 and 2, its options with defaults, its paper.

    ``sends`` and ``trains`` are "A", "B", "A+B" or "nothing"; the task head goes with both. A
    pooled method sends nothing: it needs everybody's rows in one place.
    """

    name: str
    trains: tuple[str, str]
    sends: tuple[str, str]
    options: tuple[str, ...]
    summary: str
    paper: str


def describe_methods() -> list[MethodRow]:
    """One row per file of ``rolora/methods``, in name order."""
    return [_describe(name) for name in method_names()]


def _describe(name: str) -> MethodRow:
    method = get_method(name)
    text = importlib.import_module(f"rolora.methods.{name}").__doc__ or ""
    paper = re.search(r"arXiv:[\d.]+\d", text)
    parameters = inspect.signature(method_factory(name)).parameters.values()
    sent = [frozenset() if method.pooled else method.shared(round) for round in (1, 2)]
    return MethodRow(
        name=name,
        trains=(_roles(method.trainable(1, 0)), _roles(method.trainable(2, 0))),
        sends=(_roles(sent[0]), _roles(sent[1])),
        options=tuple(f"{p.name}={p.default!r}" for p in parameters),
        summary=text.splitlines()[0].partition(": ")[2] or text.splitlines()[0],
        paper=paper.group() if paper else "",
    )


def _roles(roles: Roles) -> str:
    return "+".join(sorted(roles - {"head"})) or "nothing"

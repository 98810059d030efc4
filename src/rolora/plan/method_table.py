"""A table of all methods, made by running each of them for three rounds."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

from rolora.algorithm.adapter import Roles
from rolora.methods import METHODS, get_method, method_names
from rolora.plan.dry_run import travels


@dataclass(frozen=True)
class MethodRow:
    """One method with its default options; the fields are the keys of ``rolora methods --json``.

    Parts of the adapter are written "A", "A+B", "A+B+delta", "core" or "nothing"; the task head
    goes with them. ``trains`` and ``up`` are for rounds 1 and 2; ``down``, for rounds 2 and 3, is
    what travels to a client that took part in the round before. ``keeps``: what is trained but
    never leaves the client. ``exact``: whether the server's product is the mean of the clients'
    products, None if there is no such mean. ``ranks`` and ``averaged`` are ``heterogeneous_ranks``
    and ``supports_server_optimizer`` of ``rolora.algorithm.method.Method``; ``secure`` is
    ``sum_only`` unless the bytes are those of a ``sparse_upload``, which a secure sum cannot be
    taken of. ``options`` are given with their defaults.
    """

    name: str
    trains: tuple[str, str]
    up: tuple[str, str]
    down: tuple[str, str]
    keeps: str
    exact: bool | None
    ranks: bool
    secure: bool
    averaged: bool
    options: tuple[str, ...]
    summary: str
    paper: str


def describe_methods() -> list[MethodRow]:
    """One row per method, in name order."""
    return [_describe(name) for name in method_names()]


def _describe(name: str) -> MethodRow:
    method = get_method(name)
    text = inspect.getdoc(inspect.getmodule(METHODS.factory(name))) or name
    paper = re.search(r"arXiv:[\d.]+\d", text)
    options = METHODS.options(name).values()
    first, second, third = travels(method, 8, 6, 2)
    averages = method.federated and not method.personal_roles
    return MethodRow(
        name=name,
        trains=(_roles(method.trained(1)), _roles(method.trained(2))),
        up=(_roles(first.up), _roles(second.up)),
        down=(_roles(second.down), _roles(third.down)),
        keeps=_roles(method.personal_roles),
        exact=method.exact if averages else None,
        ranks=method.heterogeneous_ranks,
        secure=method.sum_only and not method.sparse_upload,
        averaged=method.supports_server_optimizer,
        options=tuple(f"{option.name}={option.default!r}" for option in options),
        summary=text.splitlines()[0].partition(": ")[2] or text.splitlines()[0],
        paper=paper.group() if paper else "",
    )


def _roles(roles: Roles) -> str:
    return "+".join(sorted(roles - {"head"})) or "nothing"

"""The rows of ``methods.toml``: what the tests know of each method, in one place."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Rounds = tuple[str, str]  # "A", "B", "A+B", ... in two rounds, one after the other


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method; the keys are explained in ``methods.toml``."""

    paper: str
    check: str
    trains: Rounds
    up: Rounds
    down: Rounds
    keeps: str = "nothing"
    exact: bool | None = True
    ranks: bool = False
    secure: bool = True
    averaged: bool = True
    head: bool = True
    core: int = 0
    pieces: int | None = None


def _row(given: dict[str, Any]) -> Row:
    def rounds(parts: str | list[str]) -> Rounds:
        first, second = (parts, parts) if isinstance(parts, str) else parts
        return first, second

    trains = given["trains"]
    up = given.get("up", trains)
    parts = {"trains": trains, "up": up, "down": given.get("down", up)}
    exact = None if given.get("exact") == "none" else given.get("exact", True)
    return Row(**{**given, **{key: rounds(part) for key, part in parts.items()}, "exact": exact})


ROWS: dict[str, Row] = {
    name: _row(given)
    for name, given in tomllib.loads(Path(__file__).with_name("methods.toml").read_text())[
        "methods"
    ].items()
}

"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

ConfigPath = Annotated[
    str, typer.Argument(metavar="CONFIG.toml", help="the TOML file that configures the run")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="overrides such as train.lr=1e-3"),
]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


def names(text: str | None) -> list[str]:
    """The names of a comma-separated list."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]

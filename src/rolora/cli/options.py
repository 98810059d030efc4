"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from rolora.errors import ConfigError

ConfigPath = Annotated[
    str, typer.Argument(metavar="CONFIG.toml", help="the TOML file that configures the run")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="overrides such as train.lr=1e-3"),
]
Changes = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="changes to the run's configuration, such as model.dtype=fp32 or data.text=review",
    ),
]
Methods = Annotated[str, typer.Option(help="methods, comma-separated; the first is the reference")]
Budget = Annotated[
    str | None, typer.Option(help="core-hours after which to stop (resumable): 8h, 30m")
]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


def names(text: str | None) -> list[str]:
    """The names of a comma-separated list."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def own_overrides(
    methods: str, overrides: Sequence[str] | None
) -> tuple[list[str], dict[str, list[str]]]:
    """The overrides for all methods, and those of each method in the comma-separated list."""
    from rolora.comparison.variants import addressee, checked_labels

    labels = checked_labels(methods.split(","))
    own: dict[str, list[str]] = {label: [] for label in ("", *labels)}
    for text in overrides or []:
        label, override = addressee(text, labels)
        own[label].append(override)
    return own.pop(""), own


def seeds_of(option: str, text: str) -> tuple[int, ...]:
    """The whole numbers of a comma-separated list. ConfigError for anything else."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ConfigError(f"{option} {text!r}: give whole numbers with commas, such as 0,1,2")
    return tuple(int(word) for word in words)

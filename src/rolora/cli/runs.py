"""``rolora runs`` and ``rolora env``: what runs there are, and what they run on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rolora.cli.options import Json
from rolora.cli.printing import show, table
from rolora.errors import printable

if TYPE_CHECKING:
    from rolora.results.listing import Listed


def list_runs(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="the folder that runs are in, or below")
    ] = Path("runs"),
    json: Json = False,
) -> None:
    """List runs: method, how far each is, its last and best metric. The latest is last."""
    from rolora.report.narrative import format_metric
    from rolora.results import listing

    found = listing.list_runs(folder)
    rows = [
        [
            str(one.path),
            one.method,
            _how_far(one),
            one.metric,
            *("" if value is None else format_metric(value) for value in (one.last, one.best)),
            f"{one.changed:%Y-%m-%d %H:%M}",
        ]
        for one in found
        if one.state != "unreadable"
    ]
    head = ["run", "method", "state", "metric", "last", "best", "changed"]
    closed = [one.reason for one in found if one.state == "unreadable"]
    lines = [printable(f"unreadable: {reason}") for reason in closed]
    tables = [table(head, rows, align="llllrrl")] if rows else []
    none = [] if found else [f"there are no runs in {folder}"]
    show(json, [_values(one) for one in found], *tables, *lines, *none)


def env(json: Json = False) -> None:
    """Print versions, processor, memory and GPUs: paste it into a bug report."""
    from rolora.run.environment import environment

    found = environment()
    packages = {name: known for name, known in found["packages"].items() if known is not None}
    told = {
        **{name: value for name, value in found.items() if name != "packages"},
        "memory": f"{found['memory'] / 1e9:.1f} GB, {found['memory_free'] / 1e9:.1f} GB free",
        "gpus": "; ".join(found["gpus"]) or "none",
        "git_commit": found["git_commit"] or "no checkout",
        "cuda": found["cuda"] or "torch is built without it",
        **packages,
        "not installed": ", ".join(name for name in found["packages"] if name not in packages),
    }
    del told["memory_free"]
    show(json, found, *(printable(f"{name:18} {value}") for name, value in told.items()))


def _how_far(one: Listed) -> str:
    if one.state == "finished":
        return f"finished, {one.round} rounds"
    return f"{one.state}, round {one.round} of {one.rounds}"


def _values(one: Listed) -> dict[str, Any]:
    changed = one.changed and one.changed.astimezone().isoformat()
    return {**dataclasses.asdict(one), "path": str(one.path), "changed": changed}

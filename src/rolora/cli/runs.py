"""``rolora runs``, ``watch`` and ``env``: what runs there are, how one goes, what it runs on."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rolora.cli.options import Json
from rolora.cli.printing import Interrupted, out_console, show, table
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
            one.how_far,
            one.metric,
            *("" if value is None else format_metric(value) for value in (one.last, one.best)),
            f"{one.changed:%Y-%m-%d %H:%M}",
        ]
        for one in found
        if one.state != "unreadable"
    ]
    head = ["run", "method", "state", "metric", "last", "best", "changed"]
    lines = [printable(one.how_far) for one in found if one.state == "unreadable"]
    tables = [table(head, rows, align="llllrrl")] if rows else []
    none = [] if found else [f"there are no runs in {folder}"]
    show(json, [_values(one) for one in found], *tables, *lines, *none)


def watch(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")],
    host: Annotated[
        str,
        typer.Option(
            help="the address to serve on; default: this machine only; any other address lets "
            "other machines read the page"
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="its port; 0: a free one")] = 8765,
) -> None:
    """Show a run's report in the browser, drawn again after each round, until Ctrl-C.

    The run may be going on in another process, or on sites. Nothing in its folder is changed.
    """
    from rolora.report.live import live_server

    with live_server(path, host, port) as server, contextlib.suppress(Interrupted):
        shown = f"[{host}]" if ":" in host else host
        out_console.print(f"http://{shown}:{server.server_port}/   (Ctrl-C ends)")
        server.serve_forever()


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


def _values(one: Listed) -> dict[str, Any]:
    changed = one.changed and one.changed.astimezone().isoformat()
    return {**dataclasses.asdict(one), "path": str(one.path), "changed": changed}

"""What commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from rolora.catalogue import MethodRow
    from rolora.sources import Source

out_console = Console(highlight=False, soft_wrap=True)
err_console = Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: object) -> None:
    """For programs."""
    print(json.dumps(value, indent=2))


def print_runs(paths: Sequence[Path], as_json: bool) -> None:
    """The summary of one or more run folders."""
    from rolora.display import results_table
    from rolora.report import load_run, summarise

    rows = summarise([load_run(path) for path in paths])
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
    else:
        out_console.print(results_table(rows))


def print_results(path: Path, as_json: bool) -> None:
    """The summary of a finished run, and where its report and adapter are."""
    print_runs([path], as_json)
    if not as_json:
        out_console.print(f"\nreport    {path / 'report.html'}", markup=False)
        out_console.print(f"adapter   {path / 'adapter'}", markup=False)


def print_methods(rows: Sequence[MethodRow]) -> None:
    """What each method trains, sends, and where it comes from."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("method", "trains in rounds 1, 2", "sends", "options", "what it is"):
        table.add_column(column)
    for row in rows:
        sends = " / ".join(row.sends)
        table.add_row(row.name, " / ".join(row.trains), sends, ", ".join(row.options), row.summary)
    out_console.print(table)


def print_sources(sources: Mapping[str, Source], as_json: bool) -> None:
    """What can be fetched, and how much comes over the network for it."""
    if as_json:
        print_json(
            {
                name: {"what": s.what, "megabytes": s.package.megabytes}
                for name, s in sources.items()
            }
        )
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("name", "MB", "what it is", "from"):
        table.add_column(column, justify="right" if column == "MB" else "left")
    for name, source in sources.items():
        package = source.package
        place = f"{package.client}: {package.name} {package.version}"
        table.add_row(name, str(package.megabytes), source.what, place)
    out_console.print(table)

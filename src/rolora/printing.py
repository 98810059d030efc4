"""What commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    from rolora.catalogue import MethodRow

out_console = Console(highlight=False, soft_wrap=True)
err_console = Console(stderr=True, highlight=False, soft_wrap=True)
T = TypeVar("T")


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


def print_cells(cells: Sequence[Sequence[str]]) -> None:
    """A table of numbers, its head first."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in cells[0]:
        table.add_column(column, justify="right")
    for line in cells[1:]:
        table.add_row(*line)
    out_console.print(table)


def tracked(items: Sequence[T], what: str) -> Iterator[T]:
    """The items one by one, with a bar on standard error; off a terminal one plain line."""
    if err_console.is_terminal:
        yield from track(items, what, console=err_console, transient=True)
    else:
        err_console.print(f"{what} ...", markup=False)
        yield from items

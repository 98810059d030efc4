"""What commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from rolora.catalogue import MethodRow

out_console = Console(highlight=False, soft_wrap=True)
err_console = Console(stderr=True, highlight=False, soft_wrap=True)
METHODS_LEGEND = """\
A, B   lora_A and lora_B ("B, A": by turns); the task head goes with them
Δ      a change of the base weights, kept beside them
keeps  what a client trains and never sends
exact  the server's product is the mean of the clients' products
ranks  clients may have ranks of their own
sums   the server needs no more than the sum of the updates

All of it, with what each option is if left out: rolora methods --json"""


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
    """What each method trains and sends, what may be asked of it, and where it comes from."""
    table = Table(box=None, header_style="bold", pad_edge=False, collapse_padding=True)
    heads = (
        "method",
        "trains",
        "up",
        "down",
        "keeps",
        "exact",
        "ranks",
        "sums",
        "options",
        "arXiv",
    )
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        sends = row.up != ("nothing", "nothing")
        table.add_row(
            row.name,
            turns(row.trains),
            turns(row.up),
            turns(row.down),
            turns((row.keeps, row.keeps)),
            yes_or_no(row.exact),
            yes_or_no(row.ranks if sends else None),
            yes_or_no(row.secure if sends else None),
            ", ".join(option.partition("=")[0] for option in row.options),
            row.paper.removeprefix("arXiv:"),
        )
    out_console.print(table)
    out_console.print(f"\n{METHODS_LEGEND}", markup=False)


def turns(rounds: tuple[str, str]) -> str:
    """A part of the adapter, or two that take turns, in a cell; Δ is the delta."""
    parts = dict.fromkeys(rounds)
    return ", ".join(parts).replace("delta", "Δ").replace("nothing", "–")


def yes_or_no(value: bool | None) -> str:
    """A fact in a cell; a dash where there is none."""
    return "–" if value is None else "yes" if value else "no"

"""What commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

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

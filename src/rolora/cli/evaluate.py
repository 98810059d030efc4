"""``rolora eval``: a finished run measured on other rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rolora.cli.options import Json, Overrides
from rolora.cli.printing import out_console, print_json, working


def evaluate(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER", help="a run folder or an adapter folder")
    ],
    data: Annotated[
        str,
        typer.Option(help="rows with the run's columns; a pattern measures each file separately"),
    ],
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="the base model, if it has moved")] = None,
    json: Json = False,
) -> None:
    """Measure a finished run, or an adapter folder, on other rows."""
    from rolora.cli.results import print_sets
    from rolora.data.tables import files_of, is_glob
    from rolora.run.evaluation import evaluate_adapter, evaluate_each

    if is_glob(data, root=Path()):
        sets = {name: file for file, name in files_of(data, root=Path()).items()}
        with working(f"loading and evaluating on {len(sets)} sets of rows"):
            found = dict(evaluate_each(path, sets, model, overrides or []))
        if json:
            print_json(found)
        else:
            print_sets(found)
        return
    with working("loading and evaluating"):
        metrics = evaluate_adapter(path, data, model, overrides or [])
    if json:
        print_json(metrics)
        return
    for name, value in metrics.items():
        out_console.print(f"{name:20} {value:.4f}")

"""``rolora eval``: a finished run measured on other rows, or on tasks of lm-evaluation-harness."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from rolora.cli.options import Json, Overrides, names
from rolora.cli.printing import out_console, print_json, working
from rolora.errors import ConfigError


def evaluate(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER", help="a run folder or an adapter folder")
    ],
    overrides: Overrides = None,
    data: Annotated[
        str | None,
        typer.Option(help="rows with the run's columns; a pattern measures each file separately"),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="tasks of lm-evaluation-harness, comma-separated: mmlu,humaneval"),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="a folder with your own task files")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="use only the first rows of each task")
    ] = None,
    allow_code: Annotated[
        bool,
        typer.Option("--allow-code", help="run programs that the model writes, on this machine"),
    ] = False,
    model: Annotated[str | None, typer.Option(help="the base model, if it has moved")] = None,
    json: Json = False,
) -> None:
    """Measure a finished run, or an adapter folder, on other rows or on standard tasks."""
    if (data is None) == (tasks is None):
        raise ConfigError("choose what to measure on: --data ROWS, or --tasks NAMES of the harness")
    if data is not None:
        on_rows(path, overrides or [], data, model, json)
        return
    from rolora.cli.results import print_scores
    from rolora.run.evaluation import find_adapter
    from rolora.run.harness import run_tasks

    trained = find_adapter(path, model, overrides or [])
    with working("loading the tasks and the model, then evaluating"):
        scores = run_tasks(trained, names(tasks), task_folder, limit, allow_code)
    if json:
        print_json([dataclasses.asdict(score) for score in scores])
    else:
        print_scores(scores)


def on_rows(path: Path, overrides: list[str], data: str, model: str | None, json: bool) -> None:
    """The metrics on one set of rows, or on each file if ``data`` is a pattern."""
    from rolora.cli.results import print_sets
    from rolora.data.tables import files_of, is_glob
    from rolora.run.evaluation import evaluate_adapter, evaluate_each

    if is_glob(data, root=Path()):
        sets = {name: file for file, name in files_of(data, root=Path()).items()}
        with working(f"loading and evaluating on {len(sets)} sets of rows"):
            found = dict(evaluate_each(path, sets, model, overrides))
        if json:
            print_json(found)
        else:
            print_sets(found)
        return
    with working("loading and evaluating"):
        metrics = evaluate_adapter(path, data, model, overrides)
    if json:
        print_json(metrics)
        return
    for name, value in metrics.items():
        out_console.print(f"{name:20} {value:.4f}")

"""The command that compares methods: tune, run on fresh seeds, say who is ahead at which budget."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rolora.cli.printing import err_console, out_console, print_json
from rolora.errors import ConfigError

if TYPE_CHECKING:
    from rolora.results.published import Published


def compare(
    config: Annotated[str, typer.Argument(metavar="CONFIG.toml", help="the run's TOML file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as train.lr=1e-3")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="comma-separated; the others are set against the first")
    ] = "rolora,ffa_lora,fedit",
    seeds: Annotated[str, typer.Option(help="of the table, comma-separated")] = "0,1,2",
    tune: Annotated[
        list[str] | None,
        typer.Option(help="a grid such as train.lr=1e-3,3e-3,1e-2; again for another key"),
    ] = None,
    tune_seeds: Annotated[
        str | None, typer.Option(help="to tune on, none of --seeds; default: 100,101")
    ] = None,
    tune_rounds: Annotated[
        int | None, typer.Option(help="of a run that tunes; default: train.rounds")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="stop, to be resumed, after so many core-hours: 8h, 30m")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="default: runs/NAME-compare")] = None,
    json: Annotated[bool, typer.Option("--json", help="print what a program would read")] = False,
) -> None:
    """Run several methods and seeds on the same rows, cohorts and batches, and compare them.

    With --tune each method first gets its best values, on validation rows and on seeds that the
    table does not use. The same command again goes on where it stopped.

    An override may be for one method alone: fedit:train.lr=1e-3, also in --tune. A method may have
    options: rolora,rolora+first=A
    """
    from rolora.cli.queue_display import follow_all
    from rolora.comparison.budget import core_seconds
    from rolora.comparison.grid import plan
    from rolora.comparison.queue import TUNE_SEEDS, make_search, turns
    from rolora.comparison.variants import addressed, listed
    from rolora.config.load import load_config
    from rolora.results.published import read_published

    labels = listed(methods)
    meant: dict[str, list[str]] = {label: [] for label in ("", *labels)}
    for text in overrides or []:
        label, override = addressed(text, labels)
        meant[label].append(override)
    settings = load_config(config, meant.pop(""))
    if not tune and (tune_seeds is not None or tune_rounds is not None):
        raise ConfigError("--tune-seeds and --tune-rounds go with --tune, a grid to choose from")
    tuned_on = TUNE_SEEDS if tune_seeds is None else _seeds("--tune-seeds", tune_seeds)
    search = make_search(settings, tune or [], labels, tuned_on, tune_rounds)
    comparison = plan(settings, meant, _seeds("--seeds", seeds), search)
    given = None if budget is None else core_seconds(budget)
    published = read_published(config)
    path = out or Path("runs") / f"{settings.name}-compare"
    if comparison.cut_validation:
        err_console.print(f"note: tuning is on {comparison.rows_in_words()}", markup=False)
    with contextlib.closing(turns(comparison, path, published, given)) as queue:
        follow_all(queue)
    _print(path, [run.path for run in comparison.final_runs(path, None)], published, json)


def _seeds(option: str, text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ConfigError(f"{option} {text!r}: give whole numbers with commas, such as 0,1,2")
    return tuple(int(word) for word in words)


def _print(path: Path, finals: list[Path], published: Published | None, as_json: bool) -> None:
    from rolora.cli.compare_table import comparison_text
    from rolora.comparison.folder import ComparisonFolder
    from rolora.results.export import outcome
    from rolora.results.runs import load_run

    folder = ComparisonFolder(path)
    runs, tuning = [load_run(run) for run in finals], folder.tuning()
    if as_json:
        print_json({**outcome(runs, tuning, published), "report": str(folder.report)})
        return
    out_console.print(comparison_text(runs, tuning, published))
    out_console.print(f"\nreport   {folder.report}", markup=False)

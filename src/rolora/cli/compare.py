"""``rolora compare``: tune each method, run all on fresh seeds, and rank them at equal budgets."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from rolora.cli.options import Budget, ConfigPath, Json, Methods, Overrides, own_overrides, seeds_of
from rolora.cli.printing import again, note, show, tracked
from rolora.errors import ConfigError


def compare(
    config: ConfigPath,
    overrides: Overrides = None,
    methods: Methods = "rolora,ffa_lora,fedit",
    seeds: Annotated[
        str, typer.Option(help="seeds for the final table, comma-separated")
    ] = "0,1,2",
    tune: Annotated[
        list[str] | None,
        typer.Option(help="a grid such as train.lr=1e-3,3e-3,1e-2; repeat for another key"),
    ] = None,
    tune_seeds: Annotated[
        str | None, typer.Option(help="seeds to tune on, not in --seeds; default: 100,101")
    ] = None,
    tune_rounds: Annotated[
        int | None, typer.Option(help="rounds of each tuning run; default: train.rounds")
    ] = None,
    budget: Budget = None,
    out: Annotated[
        Path | None, typer.Option(help="the comparison's folder; default: runs/NAME-compare")
    ] = None,
    json: Json = False,
) -> None:
    """Run several methods and seeds on the same rows, cohorts and batches, and compare them.

    With --tune, each method first gets its best values, chosen on validation rows and on seeds that
    the final table does not use. Run the same command again to continue a stopped comparison.

    An override can be for one method only: fedit:train.lr=1e-3, also in --tune. A method can have
    options: rolora,rolora+first=A
    """
    from rolora.config.load import load_config

    common, own = own_overrides(methods, overrides)
    settings = load_config(config, common)
    from rolora.cli.progress import follow_all
    from rolora.cli.results import comparison_text
    from rolora.comparison.budget import core_seconds
    from rolora.comparison.folder import ComparisonFolder
    from rolora.comparison.grid import TUNE_SEEDS, plan
    from rolora.comparison.queue import comparison_path, queued_runs
    from rolora.results.export import export_results
    from rolora.results.published import read_published
    from rolora.results.runs import load_run
    from rolora.run.experiment import Experiment

    if not tune and (tune_seeds is not None or tune_rounds is not None):
        raise ConfigError("--tune-seeds and --tune-rounds need --tune with a grid")
    tuned_on = TUNE_SEEDS if tune_seeds is None else seeds_of("--tune-seeds", tune_seeds)
    given = seeds_of("--seeds", seeds)
    comparison = plan(settings, own, given, tune or [], tuned_on, tune_rounds)
    seconds = None if budget is None else core_seconds(budget)
    published = read_published(config)
    folder = ComparisonFolder(comparison_path(settings, out))
    if comparison.cut_validation:
        note(f"tuning on {comparison.tuned_on()}")
    build = partial(Experiment, tracked=tracked)
    queue = queued_runs(comparison, folder.path, published, seconds, build)
    with again(), contextlib.closing(queue):
        follow_all(queue)
    runs = [load_run(run.path) for run in comparison.final_runs(folder.path, None)]
    tuning = folder.tuning()
    found = {**export_results(runs, tuning, published), "report": str(folder.report)}
    show(json, found, comparison_text(runs, tuning, published), f"\nreport   {folder.report}")

"""``rolora attack``: how methods and rules withstand bad clients."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from rolora.cli.options import (
    Budget,
    ConfigPath,
    Json,
    Methods,
    Overrides,
    names,
    own_overrides,
    seeds_of,
)
from rolora.cli.printing import again, show, tracked


def attack(
    config: ConfigPath,
    overrides: Overrides = None,
    attacks: Annotated[
        str | None,
        typer.Option(help="attacks, comma-separated; default: all that suit the task"),
    ] = None,
    bad: Annotated[int, typer.Option(min=1, help="clients that attack the others")] = 2,
    rules: Annotated[
        str,
        typer.Option(
            help="rules that combine updates, comma-separated; STEP+RULE applies a step, such as "
            "nnm, before the rule"
        ),
    ] = "mean,nnm+trimmed_mean",
    methods: Methods = "rolora,ffa_lora,fedit",
    seeds: Annotated[str, typer.Option(help="seeds, comma-separated")] = "0,1,2",
    budget: Budget = None,
    out: Annotated[
        Path | None, typer.Option(help="the folder of all runs; default: runs/NAME-attack")
    ] = None,
    json: Json = False,
) -> None:
    """Attack each method under several rules, one attack at a time, and compare the results.

    Every method also runs without an attack under each rule. Rows, cohorts and bad clients are the
    same for all. Run the same command again to continue where it stopped.

    An override can be for one method only: fedit:train.lr=1e-3. An attack can have options:
    sign_flip+factor=4. docs/robustness.md describes the attacks.
    """
    from rolora.config.load import load_config

    common, own = own_overrides(methods, overrides)
    settings = load_config(config, common)
    from rolora.cli.progress import follow_all
    from rolora.cli.results import robustness_text
    from rolora.comparison.attacks import attacked_cells, known_attacks, plan_attacks
    from rolora.comparison.budget import core_seconds
    from rolora.comparison.queue import queue_all
    from rolora.report.robustness import write_robustness
    from rolora.results.robustness import export
    from rolora.run.experiment import Experiment

    folder = out or Path("runs") / f"{settings.name}-attack"
    comparisons = plan_attacks(
        settings,
        folder,
        methods=own,
        attacks=names(attacks) or known_attacks(settings),
        rules=names(rules),
        bad=bad,
        seeds=seeds_of("--seeds", seeds),
    )
    seconds = None if budget is None else core_seconds(budget)
    build = partial(Experiment, tracked=tracked)
    queue = queue_all({one.path: one.comparison for one in comparisons}, seconds, build)
    with again(), contextlib.closing(queue):
        follow_all(queue)
    cells, metric, _ = attacked_cells(comparisons)
    report = write_robustness(cells, metric, bad, settings.name, folder / "report.html")
    found = {**export(cells, metric, bad), "report": str(report)}
    show(json, found, robustness_text(cells, metric), f"\nreport   {report}")

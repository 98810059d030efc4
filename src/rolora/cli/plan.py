"""``rolora plan``: what a run needs, before anything is downloaded."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from rolora.cli.printing import print_json, working


def plan(
    config: Annotated[str, typer.Argument(metavar="CONFIG.toml", help="the run's TOML file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as lora.rank=8")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="comma-separated; left out: the configured one")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print what a program would read")] = False,
) -> None:
    """Say what a run needs: memory, traffic, work and disk. Fetches no weights, trains nothing."""
    from rolora.cli.tables import print_plan
    from rolora.config.load import load_config
    from rolora.plan.needs import make_plan

    settings = load_config(config, overrides or [])
    names = [name.strip() for name in (methods or "").split(",") if name.strip()]
    with working("running a step on shapes alone"):
        made = make_plan(settings, names)
    if json:
        print_json(dataclasses.asdict(made))
    else:
        print_plan(made)

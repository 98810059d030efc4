"""``rolora plan``: what a run needs, before anything is downloaded."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from rolora.cli.options import ConfigPath, Json, Overrides, names
from rolora.cli.printing import print_json, working


def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    methods: Annotated[
        str | None, typer.Option(help="methods, comma-separated; default: the configured one")
    ] = None,
    json: Json = False,
) -> None:
    """Estimate the memory, traffic, work and disk of a run. Fetches no weights, trains nothing."""
    from rolora.cli.tables import print_plan
    from rolora.config.load import load_config
    from rolora.plan.needs import make_plan

    settings = load_config(config, overrides or [])
    with working("running a step on shapes alone"):
        made = make_plan(settings, names(methods))
    if json:
        print_json(dataclasses.asdict(made))
    else:
        print_plan(made)

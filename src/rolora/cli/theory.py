"""``rolora theory``: the paper's linear model, with a table, its conclusions and a figure."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rolora.cli.options import Json
from rolora.cli.printing import show, table, tracked
from rolora.errors import ConfigError, nearest

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from rolora.report.theory_text import Statement
    from rolora.theory.curves import Outcome
    from rolora.theory.sweeps import SweepRow

MARKS = {True: "holds   ", False: "fails   ", None: "note    "}


def _from_file(context: typer.Context, file: str | None) -> str | None:
    """Use the file's values as defaults of the options."""
    from rolora.config.load import read_toml

    if file is not None:
        values = read_toml(file, "experiments/linear has some")
        known = {param.name for param in context.command.params}
        known -= {"config", "out", "json"}
        if unknown := sorted(values.keys() - known):
            hint = nearest(unknown[0], [name for name in known if name])
            raise ConfigError(f"{file}: unknown key {unknown[0]!r}: {hint}")
        context.default_map = {**(context.default_map or {}), **values}
    return file


def theory(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG.toml]",
            help="a file with values for these options; the command line wins",
            is_eager=True,
            callback=_from_file,
        ),
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(help="clients, dimension, samples, noise, heterogeneity or all")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="the figure (.png or .svg), or a folder for figure and numbers")
    ] = Path("theory.png"),
    dimension: Annotated[int, typer.Option(help="length of a (LoRA's A)")] = 50,
    samples: Annotated[int, typer.Option(help="rows per client")] = 200,
    clients: Annotated[int, typer.Option(help="number of clients")] = 5,
    width: Annotated[int, typer.Option(help="length of b (LoRA's B)")] = 50,
    eta: Annotated[float, typer.Option(help="step size of a")] = 0.25,
    delta0: Annotated[float, typer.Option(help="initial sine of the angle between a and a*")] = 0.9,
    rounds: Annotated[int, typer.Option(help="iterations of the paper (b, then a)")] = 60,
    b_norm: Annotated[float, typer.Option(help="norm of every b_i*")] = 1.0,
    noise: Annotated[float, typer.Option(help="standard deviation of the noise on Y")] = 0.0,
    heterogeneity: Annotated[
        float, typer.Option(help="sine of the angle between each b_i* and b*, below 1")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="random seed")] = 0,
    json: Json = False,
) -> None:
    """Run the paper's linear model: RoLoRA's angle and its bound, FFA-LoRA's floor, FedAvg."""
    from rolora.files import finite, write_file
    from rolora.report.figures import save_picture
    from rolora.report.theory_figure import theory_figure
    from rolora.report.theory_text import theory_verdicts
    from rolora.theory.curves import simulate
    from rolora.theory.linear_model import Setting, draw_problem
    from rolora.theory.sweeps import VALUES, measure, plan_sweep

    given = locals()
    setting = Setting(**{field.name: given[field.name] for field in dataclasses.fields(Setting)})
    picture, numbers = _places(out)
    picture.parent.mkdir(parents=True, exist_ok=True)
    chosen = list(VALUES) if sweep == "all" else [sweep] if sweep else []
    plans = {name: plan_sweep(setting, name) for name in chosen}
    outcome = simulate(draw_problem(setting), functools.partial(tracked, what=f"{rounds} rounds"))
    sweeps = {
        name: [measure(name, settings) for settings in tracked(plan, f"sweep over {name}")]
        for name, plan in plans.items()
    }
    verdicts = theory_verdicts(outcome)
    save_picture(theory_figure(outcome, sweeps), picture)
    found = _for_programs(outcome, verdicts, sweeps)
    if numbers:
        write_file(numbers, dumps(finite(found), indent=2))
    written = {"picture": picture, "numbers": numbers}
    show(json, found, *_parts(outcome, verdicts, sweeps, written))


def _parts(
    outcome: Outcome,
    verdicts: Sequence[Statement],
    sweeps: Mapping[str, Sequence[SweepRow]],
    written: Mapping[str, Path | None],
) -> Iterator[RenderableType]:
    """What people read: the rounds, the verdicts, the sweeps, and where files were written."""
    from rolora.report.theory_text import round_cells, sweep_cells

    def numbers(cells: Sequence[Sequence[str]]) -> Table:
        return table(cells[0], cells[1:], align="r")

    yield numbers(round_cells(outcome))
    for verdict in verdicts:
        yield f"\n{MARKS[verdict.holds]}{verdict.text}"
    for name, rows in sweeps.items():
        yield f"\nsweep over {name}, {len(rows[0].seeds)} seeds"
        yield numbers(sweep_cells(name, rows))
    yield ""
    for what, place in written.items():
        if place is not None:
            yield f"{what}   {place}"


def _places(out: Path) -> tuple[Path, Path | None]:
    """The files of the figure and, if ``out`` is a folder or has no suffix, of the numbers."""
    if not out.suffix or out.is_dir():
        return out / "theory.png", out / "theory.json"
    if out.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"--out {out}: must end in .png or .svg, or be a folder")
    return out, None


def _for_programs(
    outcome: Outcome, verdicts: Sequence[Statement], sweeps: Mapping[str, Sequence[SweepRow]]
) -> dict[str, Any]:
    """The JSON of the command."""
    found: dict[str, Any] = {
        "settings": dataclasses.asdict(outcome.setting),
        "rounds": [dataclasses.asdict(one) for one in outcome.rounds],
        "bound_factor": outcome.factor,
        "expected": dataclasses.asdict(outcome.expected),
        "fedit": {"sin": outcome.fedit_sin, "aggregation_error": outcome.fedit_error},
        "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts],
    }
    if sweeps:
        found["sweeps"] = {
            name: [dataclasses.asdict(row) for row in rows] for name, rows in sweeps.items()
        }
    return found

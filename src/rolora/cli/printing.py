"""What commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    from rolora.demo.sources import Source
    from rolora.plan.method_table import MethodRow
    from rolora.plan.needs import MethodPlan, Plan

out_console = Console(highlight=False, soft_wrap=True)
err_console = Console(stderr=True, highlight=False, soft_wrap=True)
T = TypeVar("T")
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
    from rolora.cli.display import results_table
    from rolora.results.runs import load_run, summarise

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


def print_cells(cells: Sequence[Sequence[str]]) -> None:
    """A table of numbers, its head first."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in cells[0]:
        table.add_column(column, justify="right")
    for line in cells[1:]:
        table.add_row(*line)
    out_console.print(table)


def print_sets(found: Mapping[str, Mapping[str, float]]) -> None:
    """The metrics of several sets of rows, a line each, and their plain mean."""
    names = list(next(iter(found.values())))
    lines = [[name, *(f"{metrics[key]:.4f}" for key in names)] for name, metrics in found.items()]
    means = [sum(metrics[key] for metrics in found.values()) / len(found) for key in names]
    print_cells([["rows", *names], *lines, ["mean", *(f"{mean:.4f}" for mean in means)]])


def tracked(items: Sequence[T], what: str) -> Iterator[T]:
    """The items one by one, with a bar on standard error; off a terminal one plain line."""
    if err_console.is_terminal:
        yield from track(items, what, console=err_console, transient=True)
    else:
        err_console.print(f"{what} ...", markup=False)
        yield from items


def print_plan(plan: Plan) -> None:
    """A plan: the model and the clients, then each kind of round, then the whole run."""
    part = "all" if plan.cohort == plan.clients else f"{plan.cohort}"
    steps = "an unknown number of steps" if plan.steps is None else f"{plan.steps:,.4g} steps"
    rows = "" if plan.rows is None else f" with {plan.rows:,} rows"
    for line in (
        f"model      {plan.model}, {_short(plan.parameters)} parameters in {plan.dtype}: "
        f"{_bytes(plan.weights)} in memory, {_bytes(plan.stored)} on disk "
        f"(configuration from {plan.source})",
        f"clients    {plan.clients}{rows}, {part} in each of {plan.rounds} rounds, "
        f"{steps} of about {plan.tokens:,} tokens",
        f"cache      {_bytes(plan.cache)} for layers below the adapters",
    ):
        out_console.print(line, markup=False)
    rounds = [(method, each) for method in plan.methods for each in method.rounds]
    table = _plan_table([f"{method.name}: {each.factors}" for method, each in rounds])
    for what, values in {
        "parameters trained": [f"{each.trained:,}" for _, each in rounds],
        "one client sends": [_bytes(each.up) for _, each in rounds],
        "one client receives": [_bytes(each.down) for _, each in rounds],
        "one client's step, FLOPs": [_short(each.flops) for _, each in rounds],
        "activations kept": [_bytes(each.activations) for _, each in rounds],
        "optimiser state": [_bytes(each.optimizer) for _, each in rounds],
        "memory at the peak": [_bytes(each.peak) for _, each in rounds],
    }.items():
        table.add_row(what, *values)
    out_console.print()
    out_console.print(table)
    out_console.print()
    out_console.print(_whole_runs(plan.methods))
    for note in plan.notes:
        out_console.print(f"note: {note}", markup=False)


def _whole_runs(methods: Sequence[MethodPlan]) -> Table:
    table = _plan_table([method.name for method in methods])
    roles = sorted({role for method in methods for role in method.parameters})
    for role in roles:
        counts = [f"{method.parameters.get(role, 0):,}" for method in methods]
        table.add_row(f"parameters of {role}", *counts)
    about = ["" if method.counted else "about " for method in methods]
    means = [
        [sum(getattr(each, way) for each in method.rounds) / len(method.rounds)]
        for way in ("up", "down")
        for method in methods
    ]
    for what, values in {
        "clients trained at once": [str(method.bank) for method in methods],
        "their adapters": [_bytes(method.adapters) for method in methods],
        "one client sends, mean": [_bytes(mean) for (mean,) in means[: len(methods)]],
        "one client receives, mean": [_bytes(mean) for (mean,) in means[len(methods) :]],
        "receives in its first round": [_bytes(method.first_down) for method in methods],
        "all clients send": [
            a + _bytes(method.up) for a, method in zip(about, methods, strict=True)
        ],
        "all clients receive": [
            a + _bytes(method.down) for a, method in zip(about, methods, strict=True)
        ],
        "training, FLOPs": [_short(method.flops) for method in methods],
        "checkpoints and adapter": [_bytes(method.checkpoints) for method in methods],
        "what clients keep, on disk": [_bytes(method.personal) for method in methods],
    }.items():
        table.add_row(what, *values)
    return table


def _plan_table(columns: Sequence[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _bytes(count: float | None) -> str:
    """Megabytes and so on are powers of 1000."""
    return "unknown" if count is None else f"{_short(count)}B"


def _short(count: float | None) -> str:
    """Three digits or more and a power of 1000: 1.57 M."""
    if count is None:
        return "unknown"
    power = 0
    while abs(count) >= 1000 and power < 6:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {' kMGTPE'[power].strip()}".strip() + ("" if power else " ")


def print_sources(sources: Mapping[str, Source], as_json: bool) -> None:
    """What can be fetched, and how much comes over the network for it."""
    if as_json:
        print_json(
            {
                name: {"what": s.what, "megabytes": s.package.megabytes}
                for name, s in sources.items()
            }
        )
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("name", "MB", "what it is", "from"):
        table.add_column(column, justify="right" if column == "MB" else "left")
    for name, source in sources.items():
        package = source.package
        place = f"{package.client}: {package.name} {package.version}"
        table.add_row(name, str(package.megabytes), source.what, place)
    out_console.print(table)

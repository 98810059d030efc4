"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere.

Everything goes to standard error; standard output is for results.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from rolora.algorithm.adapter import Assignment, Failure, Update
from rolora.algorithm.method import Method
from rolora.results.runs import Row
from rolora.run.progress import described
from rolora.run.runs import Run
from rolora.training.engine import ClientMetrics, Engine, Job
from rolora.training.rounds import RoundResult

console = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Watched:
    """An engine that tells ``tick`` of every update as it arrives, and changes nothing else."""

    engine: Engine
    tick: Callable[[], None]

    def clients(self) -> Mapping[str, int]:
        """As the engine's own."""
        return self.engine.clients()

    def run(self, method: Method, job: Job) -> Iterator[Update | Failure]:
        """As the engine's own."""
        for reply in self.engine.run(method, job):
            self.tick()
            yield reply

    def evaluate(self, method: Method, clients: Iterable[Assignment]) -> Iterable[ClientMetrics]:
        """As the engine's own."""
        return self.engine.evaluate(method, clients)


@dataclass(frozen=True)
class Overall:
    """Where a run stands among others: ``done`` of ``of`` are behind it.

    ``after`` is told of each round and says how long all of them will take; it may raise, to stop.
    """

    done: int
    of: int
    after: Callable[[RoundResult], str]


def follow(run: Run, title: str, overall: Overall | None = None) -> RoundResult | None:
    """Run to the end, showing each round; returns the last one (None if there was none to do)."""
    for note in run.notes:
        console.print(f"note: {note}", markup=False)
    federation = run.experiment.federation
    left = federation.rounds - run.state.server.round
    last: RoundResult | None = None
    with contextlib.ExitStack() as stack:
        advance, tick = stack.enter_context(_bar(title, left, overall))
        rounds = run.rounds(lambda engine: Watched(engine, tick))
        stack.enter_context(contextlib.closing(rounds))
        for last, text in described(rounds, run):
            advance(text, overall.after(last) if overall else "")
    return last


@contextlib.contextmanager
def _bar(
    title: str, rounds: int, overall: Overall | None
) -> Iterator[tuple[Callable[[str, str], None], Callable[[], None]]]:
    """``advance(line, of all runs)`` after a round, ``tick()`` after a client; bars only on a
    terminal."""
    if not console.is_terminal:
        yield (lambda text, _: console.print(f"{title}: {text}", markup=False)), (lambda: None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
    )
    updates = "rounds   {} updates in this round"
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=rounds, said=updates.format(0))
        if overall:
            total = progress.add_task("all", total=overall.of, completed=overall.done, said="runs")
        count = 0

        def advance(text: str, said: str) -> None:
            nonlocal count
            count = 0
            console.print(Text.assemble((title, "bold"), f": {text}"))
            finished = 0 if text.startswith("before") or "no quorum" in text else 1
            progress.update(task, advance=finished, said=updates.format(0))
            if overall:
                progress.update(total, said=f"runs   {said}")

        def tick() -> None:
            nonlocal count
            count += 1
            progress.update(task, said=updates.format(count))

        yield advance, tick


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on a terminal while something takes its time.

    It writes to the terminal itself, so that it goes on turning where others are silenced.
    """
    if console.is_terminal:
        with Console(file=sys.stderr).status(what):
            yield
    else:
        console.print(f"{what} ...", markup=False)
        yield


def results_table(rows: Sequence[Row]) -> Table:
    """The summary of one or more runs as people read it."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    metric = rows[0].metric if rows else "metric"
    table.add_column("method")
    for name in (f"{metric} (mean ± sd)", "seeds", "best", "MB up", "MB down", "agg. error", "s"):
        table.add_column(name, justify="right")
    for row in rows:
        spread = "" if row.final_sd is None else f" ± {row.final_sd:.3f}"
        error = "unknown" if row.aggregation_error is None else f"{row.aggregation_error:.1e}"
        table.add_row(
            row.method,
            f"{row.final_mean:.3f}{spread}",
            ",".join(map(str, row.seeds)),
            f"{row.best_mean:.3f}",
            f"{row.megabytes_up:.2f}",
            f"{row.megabytes_down:.2f}",
            error,
            f"{row.seconds:.0f}",
        )
    return table


def split_table(split: Mapping[str, Any], test_rows: int) -> Group:
    """Who holds how many rows, and of which label where there are at most 12 labels."""
    labels = sorted({label for client in split["clients"] for label in client["labels"]})
    shown = labels if len(labels) <= 12 else []
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("client")
    for column in ("rows", *shown):
        table.add_column(Text(column), justify="right")
    for client in split["clients"]:
        counts = [str(client["labels"].get(label, "")) for label in shown]
        table.add_row(Text(client["id"]), str(client["num_examples"]), *counts)
    total = sum(client["num_examples"] for client in split["clients"])
    note = f"\nnote: {split['note']}" if split["note"] else ""
    return Group(table, Text(f"\n{total} training rows, {test_rows} test rows{note}"))


def masked_text(rows: Iterable[Sequence[tuple[str, bool]]]) -> Text:
    """Each row in pieces; those that are trained on stand between ⟦ and ⟧."""
    text = Text()
    for row, pieces in enumerate(rows, start=1):
        text.append(f"\nrow {row}, trained on what is between ⟦ and ⟧:\n")
        for piece, trained in pieces:
            text.append(*((f"⟦{piece}⟧", "bold green") if trained else (piece, "dim")))
        text.append("\n")
    return text

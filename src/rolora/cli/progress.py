"""The progress of runs: live bars on a terminal, plain lines elsewhere, on standard error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from rolora.algorithm.adapter import Assignment, Failure, Update
from rolora.algorithm.method import Method
from rolora.cli.printing import err_console
from rolora.comparison.budget import Timing, core_hours
from rolora.comparison.queue import QueuedRun
from rolora.run.progress import clock, described
from rolora.run.runs import Run
from rolora.training.engine import ClientMetrics, Engine, Job
from rolora.training.local import NonFiniteLoss
from rolora.training.rounds import RoundResult


@dataclass(frozen=True)
class Watched:
    """An engine that calls ``tick`` for every update as it arrives, and changes nothing else."""

    engine: Engine
    tick: Callable[[], None]

    def clients(self) -> Mapping[str, int]:
        """As the engine's."""
        return self.engine.clients()

    def run(self, method: Method, job: Job) -> Iterator[Update | Failure]:
        """As the engine's."""
        for reply in self.engine.run(method, job):
            self.tick()
            yield reply

    def evaluate(self, method: Method, clients: Iterable[Assignment]) -> Iterable[ClientMetrics]:
        """As the engine's."""
        return self.engine.evaluate(method, clients)


@dataclass(frozen=True)
class Overall:
    """The position of a run among others: ``done`` of ``of`` are finished.

    ``after`` is called with each round and returns how long all runs will take; it may raise.
    """

    done: int
    of: int
    after: Callable[[RoundResult], str]


def follow(run: Run, title: str, overall: Overall | None = None) -> RoundResult | None:
    """Run to the end, showing each round; returns the last round (None if none was left)."""
    for note in run.notes:
        err_console.print(f"note: {note}")
    left = run.experiment.federation.rounds - run.state.server.round
    last: RoundResult | None = None
    with contextlib.ExitStack() as stack:
        advance, tick = stack.enter_context(_bars(title, left, overall))
        rounds = run.rounds(lambda engine: Watched(engine, tick))
        stack.enter_context(contextlib.closing(rounds))
        for last, text in described(rounds, run):
            advance(last, text, overall.after(last) if overall else "")
    return last


Advance = Callable[[RoundResult, str, str], None]


@contextlib.contextmanager
def _bars(
    title: str, rounds: int, overall: Overall | None
) -> Iterator[tuple[Advance, Callable[[], None]]]:
    """``advance(round, line, time left)`` to call after a round, ``tick()`` after an update."""
    if not err_console.is_terminal:
        yield (lambda _, text, __: err_console.print(f"{title}: {text}")), (lambda: None)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
    )
    updates = "rounds   {} updates in this round"
    with Progress(*columns, console=err_console, transient=True) as progress:
        task = progress.add_task(title, total=rounds, text=updates.format(0))
        if overall:
            total = progress.add_task("all", total=overall.of, completed=overall.done, text="runs")
        count = 0

        def advance(result: RoundResult, text: str, left: str) -> None:
            nonlocal count
            count = 0
            err_console.print(Text.assemble((title, "bold"), f": {text}"))
            finished = int(result.advanced and result.round > 0)
            progress.update(task, advance=finished, text=updates.format(0))
            if overall:
                progress.update(total, text=f"runs   {left}")

        def tick() -> None:
            nonlocal count
            count += 1
            progress.update(task, text=updates.format(count))

        yield advance, tick


def follow_all(queue: Iterable[QueuedRun]) -> None:
    """Run the whole queue, showing each round.

    A run that diverges is reported and skipped. Raises BudgetSpent when the budget is used up.
    """
    notes: set[str] = set()
    estimated = False
    for queued in queue:
        new = tuple(note for note in queued.run.notes if note not in notes)
        notes.update(new)
        estimated = _follow_queued(replace(queued, run=replace(queued.run, notes=new)), estimated)


def _follow_queued(queued: QueuedRun, estimated: bool) -> bool:
    """Run one of the queue. The whole is estimated once, as soon as possible; returns if it was."""
    name, done = queued.planned.path.name, list(queued.done)

    def left(round: int) -> str:
        nonlocal estimated
        seconds = queued.seconds_left(done, round)
        if seconds is None:
            return ""
        if not estimated:
            err_console.print(_estimate(queued, done, seconds))
        estimated = True
        return f"{clock(seconds)} left in all"

    def after(result: RoundResult) -> str:
        if result.advanced:
            done.append(Timing(result.round, bool(result.metrics), result.seconds))
        text = left(result.round)
        queued.refuse_spent(done, result.round)
        return text

    where = f"run {queued.number} of {queued.of}: {name}"
    err_console.print(f"{where}   {left(queued.run.state.server.round or -1)}".rstrip())
    try:
        follow(queued.run, name, Overall(queued.number - 1, queued.of, after))
    except NonFiniteLoss as error:
        err_console.print(f"{name}: diverged; skipping it: {error}")
    return estimated


def _estimate(queued: QueuedRun, done: Sequence[Timing], left: float) -> str:
    """How long the whole comparison takes, and whether the budget is enough."""
    threads = torch.get_num_threads()
    whole = sum(one.seconds for one in done) + left
    text = f"estimate: {queued.of} runs take about {clock(whole)} on {threads} "
    text += f"thread{'' if threads == 1 else 's'}, {core_hours(whole)} core-hours"
    if whole > left:
        text += f", of which {clock(left)} are left"
    if queued.budget is not None:
        share = queued.budget / (whole * threads)
        text += f"; the budget is {queued.budget / 3600:.2g} core-hours, "
        text += "enough for all" if share >= 1 else f"enough for {share:.0%} of it"
    return text

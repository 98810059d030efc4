"""The progress of runs: live bars on a terminal, plain lines elsewhere, on standard error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from rolora.algorithm.adapter import Failure, Update
from rolora.cli.printing import err_console, note, working
from rolora.comparison.budget import Outlook, Timing
from rolora.comparison.queue import QueuedRun
from rolora.run.progress import clock, described
from rolora.run.runs import Run
from rolora.training.local import NonFiniteLoss
from rolora.training.rounds import RoundResult


def follow(run: Run, title: str) -> int:
    """Run to the end, showing each round; returns how many there were."""
    for text in run.notes:
        note(text)
    with _bars() as bars:
        return _show(run, title, bars)


@contextlib.contextmanager
def _bars() -> Iterator[Progress]:
    """Bars on a terminal; elsewhere they are not shown."""
    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        console=err_console,
        transient=True,
    )
    with bars if err_console.is_terminal else contextlib.nullcontext():
        yield bars


def _show(
    run: Run, title: str, bars: Progress, finished: Callable[[RoundResult], None] | None = None
) -> int:
    """Run to the end with a bar, and a line for each round; returns how many there were.

    ``finished`` is called with each round before its line is printed; it may raise.
    """
    left = run.experiment.federation.rounds - run.state.server.round
    updates = "rounds   {} updates in this round"
    bar = bars.add_task(title, total=left, text=updates.format(0))
    count = rounds_done = 0

    def tick(reply: Update | Failure) -> None:
        nonlocal count
        count += 1
        bars.update(bar, text=updates.format(count))

    with contextlib.closing(run.rounds(tick)) as rounds:
        for result, text in described(rounds, run):
            if finished is not None:
                finished(result)
            err_console.print(text)
            count = 0
            trained = int(result.advanced and result.round > 0)
            bars.update(bar, advance=trained, text=updates.format(count))
            rounds_done += 1
    return rounds_done


def follow_all(queue: Iterable[QueuedRun]) -> None:
    """Run the whole queue, showing each round and, once, an estimate of the total time.

    A run that diverges is reported and skipped. Raises BudgetSpent when the budget is used up.
    """
    said: set[str] = set()
    rest = iter(queue)
    with working("loading the model and the data"):
        first = list(islice(rest, 1))
    for queued in chain(first, rest):
        try:
            _follow_queued(queued, said)
        except NonFiniteLoss as error:
            err_console.print(f"{queued.planned.path.name}: diverged; skipping it: {error}")


def _follow_queued(queued: QueuedRun, said: set[str]) -> None:
    """Run one run of the queue; ``said``: the notes printed for earlier ones."""
    run, outlook, name = queued.run, queued.outlook, queued.planned.path.name
    done = list(queued.done)

    def left(round: int) -> str:
        seconds = outlook.seconds_left(done, round)
        if seconds is None:
            return ""
        if "estimate" not in said:
            err_console.print(_estimate(outlook, done, seconds))
            said.add("estimate")
        return f"{clock(seconds)} left in all"

    where = f"run {outlook.number} of {outlook.of}: {name}"
    err_console.print(f"{where}   {left(run.state.server.round or -1)}".rstrip())
    for text in run.notes:
        if text not in said:
            note(text)
    said.update(run.notes)
    with _bars() as bars:
        total = bars.add_task("all", total=outlook.of, completed=outlook.number - 1, text="runs")

        def finished(result: RoundResult) -> None:
            if result.advanced:
                done.append(Timing(result.round, bool(result.metrics), result.seconds))
            bars.update(total, text=f"runs   {left(result.round)}")
            outlook.refuse_spent(done, result.round)

        _show(run, name, bars, finished)


def _estimate(outlook: Outlook, done: Sequence[Timing], left: float) -> str:
    """How long the whole comparison takes, and whether the budget is enough."""
    threads = outlook.cores
    whole = sum(one.seconds for one in done) + left
    text = f"estimate: {outlook.of} runs take about {clock(whole)} on {threads} "
    text += f"thread{'' if threads == 1 else 's'}, {outlook.core_hours(whole)} core-hours"
    if whole > left:
        text += f", of which {clock(left)} are left"
    if outlook.budget is not None:
        share = outlook.budget / (whole * threads)
        text += f"; the budget is {outlook.budget / 3600:.2g} core-hours, "
        text += "enough for all" if share >= 1 else f"enough for {share:.0%} of it"
    return text

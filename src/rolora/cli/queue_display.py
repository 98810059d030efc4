"""What a person sees while the runs of a comparison go on: which of how many, and how long yet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from rolora.cli.display import Overall, console, follow
from rolora.comparison.budget import Tally, core_hours
from rolora.comparison.queue import QueuedRun
from rolora.run.progress import clock
from rolora.training.local import NonFiniteLoss
from rolora.training.rounds import RoundResult


def follow_all(turns: Iterable[QueuedRun]) -> None:
    """Run all of them, showing each round.

    A run that diverges is said to and left behind. Raises BudgetSpent when the budget is.
    """
    said: set[str] = set()
    estimated = False

    for turn in turns:
        name, so_far = turn.planned.path.name, turn.tally
        start = turn.run.state.server.round or -1
        first = turn.seconds_left(so_far, start)
        left = "" if first is None else f"   {clock(first)} left in all"
        console.print(f"run {turn.number} of {turn.of}: {name}{left}", markup=False)
        if first is not None and not estimated:
            estimated = _tell(turn, so_far, first)

        def after(result: RoundResult, turn: QueuedRun = turn) -> str:
            nonlocal so_far, estimated
            if result.advanced:
                so_far = so_far.plus(result.round, bool(result.metrics), result.seconds)
            seconds = turn.seconds_left(so_far, result.round)
            if seconds is not None and not estimated:
                estimated = _tell(turn, so_far, seconds)
            turn.refuse_spent(so_far, result.round)
            return "" if seconds is None else f"{clock(seconds)} left in all"

        new = tuple(note for note in turn.run.notes if note not in said)
        said.update(new)
        try:
            follow(replace(turn.run, notes=new), name, Overall(turn.number - 1, turn.of, after))
        except NonFiniteLoss as error:
            console.print(f"{name}: diverged, and goes no further: {error}", markup=False)


def _tell(turn: QueuedRun, so_far: Tally, left: float) -> bool:
    """Say once what all of it will take, and whether the budget is enough."""
    threads = torch.get_num_threads()
    whole = so_far.seconds + left
    text = f"estimate: {turn.of} runs take about {clock(whole)} on {threads} "
    text += f"thread{'' if threads == 1 else 's'}, {core_hours(whole)} core-hours"
    if so_far.seconds:
        text += f", of which {clock(left)} are left"
    if turn.budget is not None:
        share = turn.budget / (whole * threads)
        text += f"; the budget is {turn.budget / 3600:.2g} core-hours, "
        text += "enough for all" if share >= 1 else f"enough for {share:.0%} of it"
    console.print(text, markup=False)
    return True

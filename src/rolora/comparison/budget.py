"""Core-hours: how long a comparison has taken, will take, and may take.

A core-second is one second of one of torch's threads, of each worker process, busy or not, as a
scheduler bills it. Only the rounds on disk count; loading a model does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch

from rolora.errors import BudgetSpent, ConfigError

SECONDS = {"s": 1, "m": 60, "h": 3600}


def core_seconds(text: str) -> float:
    """``8h``, ``30m`` or ``90s`` in seconds. ConfigError for anything else, and for zero."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)([smh])", text.strip())
    if found is None:
        raise ConfigError(f"--budget {text!r}: give core-hours such as 8h, or 30m, or 90s")
    seconds = float(found[1]) * SECONDS[found[2]]
    if seconds == 0:
        raise ConfigError(f"--budget {text}: the budget must be more than zero")
    return seconds


class Timing(NamedTuple):
    """A round that is done, or still to do; round 0 is the evaluation before training."""

    round: int
    evaluated: bool
    seconds: float = 0.0


def estimate(done: Sequence[Timing], left: Iterable[Timing]) -> float | None:
    """The seconds that the rounds ``left`` will take; None before any round of training."""
    trained = [one for one in done if one.round > 0]
    if not trained:
        return None
    before = [one.seconds for one in done if one.round == 0]
    evaluation = fmean(before) if before else 0.0
    seconds = sum(one.seconds - one.evaluated * evaluation for one in trained)
    training = max(seconds, 0.0) / len(trained)
    return sum((one.round > 0) * training + one.evaluated * evaluation for one in left)


@dataclass(frozen=True)
class Outlook:
    """The progress of a comparison at its run ``number`` of ``of``.

    ``rounds`` are all rounds of this run, ``after`` those of the runs after it; ``budget`` is in
    core-seconds; ``workers`` processes train. The methods take ``done``, all rounds on disk.
    """

    number: int
    of: int
    rounds: Sequence[Timing]
    after: Sequence[Timing]
    budget: float | None
    workers: int = 1

    @property
    def cores(self) -> int:
        """The threads of all processes that train."""
        return self.workers * torch.get_num_threads()

    def core_hours(self, seconds: float) -> str:
        """'8.2': the core-hours of all threads in this many seconds, to two digits."""
        return f"{seconds * self.cores / 3600:.2g}"

    def seconds_left(self, done: Sequence[Timing], round: int = -1) -> float | None:
        """An estimate for the whole comparison after this ``round``; None if there is none yet."""
        return estimate(done, [*self.rounds[round + 1 :], *self.after])

    def refuse_spent(self, done: Sequence[Timing], round: int = -1) -> None:
        """Raise BudgetSpent if the budget is used up and rounds of this run are left."""
        seconds = sum(one.seconds for one in done)
        spent = self.budget is not None and seconds * self.cores >= self.budget
        if spent and round < self.rounds[-1].round:
            left = self.seconds_left(done, round)
            more = "" if left is None else f", about {self.core_hours(left)} core-hours remain"
            raise BudgetSpent(
                f"the budget is spent ({self.core_hours(seconds)} core-hours): "
                f"{self.number - 1} of {self.of} runs are done{more}; continue with the same "
                "command and a larger --budget, or none"
            )

"""Core-hours: how long a comparison has taken, will take, and may take.

A core-second is one second of one of torch's threads, busy or not, as a scheduler bills it. Only
the rounds on disk count; loading a model does not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from rolora.errors import BudgetSpent, ConfigError
from rolora.results.runs import RunRecord

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


def core_hours(seconds: float) -> str:
    """'8.2': core-hours that all threads spend in so many seconds, to two digits."""
    return f"{seconds * torch.get_num_threads() / 3600:.2g}"


@dataclass(frozen=True)
class Workload:
    """The ``rounds`` of training and the ``evaluations`` that a run consists of."""

    rounds: int = 0
    evaluations: int = 0

    @classmethod
    def of(cls, rounds: int, every: int, done: int = -1) -> Workload:
        """What is left of a run after round ``done``: 0 is the evaluation before training."""
        left = range(max(done + 1, 0), rounds + 1)
        evaluations = sum(round % every == 0 or round == rounds for round in left)
        return cls(rounds - max(done, 0), evaluations)

    def __add__(self, other: Workload) -> Workload:
        return Workload(self.rounds + other.rounds, self.evaluations + other.evaluations)


@dataclass(frozen=True)
class TimeSpent:
    """Seconds so far: of ``first`` evaluations before training, and of ``rounds`` of training, of
    which ``evaluated`` ended with an evaluation."""

    first: int = 0
    first_seconds: float = 0.0
    rounds: int = 0
    round_seconds: float = 0.0
    evaluated: int = 0

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.first_seconds + self.round_seconds

    def plus(self, round: int, evaluated: bool, seconds: float) -> TimeSpent:
        """With one more round; round 0 is the evaluation before training."""
        if round == 0:
            return replace(self, first=self.first + 1, first_seconds=self.first_seconds + seconds)
        return replace(
            self,
            rounds=self.rounds + 1,
            round_seconds=self.round_seconds + seconds,
            evaluated=self.evaluated + evaluated,
        )

    def plus_run(self, run: RunRecord) -> TimeSpent:
        """With all rounds of a run."""
        spent = self
        for line in run.rounds:
            spent = spent.plus(line["round"], bool(line["metrics"]), line["seconds"])
        return spent

    def estimate(self, work: Workload) -> float | None:
        """The seconds that ``work`` will take at this pace; None before any round of training."""
        if not self.rounds:
            return None
        evaluation = self.first_seconds / self.first if self.first else 0.0
        training = max(self.round_seconds - self.evaluated * evaluation, 0.0) / self.rounds
        return work.rounds * training + work.evaluations * evaluation


def refuse_spent(
    budget: float | None, spent: TimeSpent, done: int, of: int, left: float | None
) -> None:
    """Raise BudgetSpent if there is a budget, in core-seconds, and it is used up."""
    if budget is not None and spent.seconds * torch.get_num_threads() >= budget:
        more = "" if left is None else f", about {core_hours(left)} core-hours are left"
        raise BudgetSpent(
            f"the budget is spent ({core_hours(spent.seconds)} core-hours): {done} of {of} runs "
            f"are done{more}; continue with the same command and a larger --budget, or none"
        )

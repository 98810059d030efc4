"""Core-hours: what a comparison may take, has taken, and will take.

A core-second is a second of one of torch's threads, busy or not, as a scheduler bills it. Counted
are the rounds on disk; loading a model is not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from rolora.errors import BudgetSpent, ConfigError
from rolora.results.runs import Run

SECONDS = {"s": 1, "m": 60, "h": 3600}


def core_seconds(text: str) -> float:
    """``8h``, ``30m`` or ``90s`` in seconds. ConfigError for anything else, and for nothing."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)([smh])", text.strip())
    if found is None:
        raise ConfigError(f"--budget {text!r}: give core-hours such as 8h, or 30m, or 90s")
    seconds = float(found[1]) * SECONDS[found[2]]
    if seconds == 0:
        raise ConfigError(f"--budget {text}: nothing can be done in no time")
    return seconds


def core_hours(seconds: float) -> str:
    """'8.2', of this many seconds of all threads: two digits."""
    return f"{seconds * torch.get_num_threads() / 3600:.2g}"


@dataclass(frozen=True)
class Length:
    """What a run is made of: ``rounds`` of training, ``evaluations``, the one before included."""

    rounds: int
    evaluations: int

    @classmethod
    def of(cls, rounds: int, every: int, done: int = -1) -> Length:
        """Of a run evaluated every so many rounds, without the rounds up to ``done``."""
        evaluated = [
            r for r in range(max(done + 1, 0), rounds + 1) if r % every == 0 or r == rounds
        ]
        return cls(rounds - max(done, 0), len(evaluated))

    def plus(self, other: Length) -> Length:
        """Both, one after the other."""
        return Length(self.rounds + other.rounds, self.evaluations + other.evaluations)


@dataclass(frozen=True)
class Tally:
    """Seconds so far: of evaluations before training, and of ``rounds`` of training, of which
    ``evaluated`` ended with an evaluation."""

    first: int = 0
    first_seconds: float = 0.0
    rounds: int = 0
    round_seconds: float = 0.0
    evaluated: int = 0

    @property
    def seconds(self) -> float:
        """Of everything."""
        return self.first_seconds + self.round_seconds

    def plus(self, round: int, evaluated: bool, seconds: float) -> Tally:
        """With one more round; round 0 is the evaluation before training."""
        if round == 0:
            return replace(self, first=self.first + 1, first_seconds=self.first_seconds + seconds)
        return replace(
            self,
            rounds=self.rounds + 1,
            round_seconds=self.round_seconds + seconds,
            evaluated=self.evaluated + evaluated,
        )

    def with_run(self, run: Run) -> Tally:
        """With the rounds of a run folder."""
        tally = self
        for line in run.rounds:
            tally = tally.plus(line["round"], bool(line["metrics"]), line["seconds"])
        return tally

    def estimate(self, length: Length) -> float | None:
        """Seconds that this will take, by the means so far; None before a round of training."""
        if not self.rounds:
            return None
        evaluation = self.first_seconds / self.first if self.first else 0.0
        training = max(self.round_seconds - self.evaluated * evaluation, 0.0) / self.rounds
        return length.rounds * training + length.evaluations * evaluation


def refuse_spent(
    budget: float | None, tally: Tally, done: int, of: int, left: float | None
) -> None:
    """Raise BudgetSpent if there is a budget in core-seconds and the tally has come to it."""
    if budget is not None and tally.seconds * torch.get_num_threads() >= budget:
        more = "" if left is None else f", about {core_hours(left)} core-hours are left"
        raise BudgetSpent(
            f"the budget is spent ({core_hours(tally.seconds)} core-hours): {done} of {of} runs "
            f"are done{more}; go on with the same command and a larger --budget, or none"
        )

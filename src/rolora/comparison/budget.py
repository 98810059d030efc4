"""Core-hours: how long a comparison has taken, will take, and may take.

A core-second is one second of one of torch's threads, busy or not, as a scheduler bills it. Only
the rounds on disk count; loading a model does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

import torch

from rolora.config.schema import RunConfig
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


def core_hours(seconds: float) -> str:
    """'8.2': core-hours that all threads spend in so many seconds, to two digits."""
    return f"{seconds * torch.get_num_threads() / 3600:.2g}"


class Timing(NamedTuple):
    """A round that is done, or still to do; round 0 is the evaluation before training."""

    round: int
    evaluated: bool
    seconds: float = 0.0


def rounds_left(config: RunConfig, done: int = -1) -> list[Timing]:
    """The rounds of a run after round ``done``; all of them by default."""
    last, every = config.train.rounds, config.eval.every
    return [Timing(n, n % every == 0 or n == last) for n in range(done + 1, last + 1)]


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


def refuse_spent(
    budget: float | None, done: Sequence[Timing], runs: str, left: float | None
) -> None:
    """Raise BudgetSpent if there is a budget, in core-seconds, and it is used up.

    ``runs`` says how many are done ('3 of 9'); ``left`` is the estimate of the seconds left.
    """
    seconds = sum(one.seconds for one in done)
    if budget is not None and seconds * torch.get_num_threads() >= budget:
        more = "" if left is None else f", about {core_hours(left)} core-hours are left"
        raise BudgetSpent(
            f"the budget is spent ({core_hours(seconds)} core-hours): {runs} runs are done{more}; "
            "continue with the same command and a larger --budget, or none"
        )

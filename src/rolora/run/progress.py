"""A run's rounds as lines of text, for a terminal, a log or another process."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rolora.run.runs import Run
from rolora.training.rounds import RoundResult


def described(rounds: Iterable[RoundResult], run: Run) -> Iterator[tuple[RoundResult, str]]:
    """Each round of ``run`` as it finishes, with its line: see ``describe``."""
    total = run.experiment.federation.rounds
    left = total - run.state.server.round
    sent, done, started = Sent(), 0, time.monotonic()
    for result in rounds:
        sent = sent.plus(result)
        done += result.advanced and result.round > 0
        pace = (time.monotonic() - started) / done if done else 0.0
        yield result, describe(result, total, sent, pace * (left - done))


@dataclass(frozen=True)
class Sent:
    """Bytes sent so far."""

    up: int = 0
    down: int = 0

    def plus(self, result: RoundResult) -> Sent:
        """With this round's."""
        return Sent(self.up + result.bytes_up, self.down + result.bytes_down)


def describe(result: RoundResult, rounds: int, sent: Sent, seconds_left: float) -> str:
    """One line about a round: phase, cohort, loss, metrics, aggregation error, bytes, time left."""
    if result.round == 0:
        return f"before training   {_metrics(result)}"
    phase = "+".join(role for role in result.factors if role != "head") or "head"
    parts = [f"round {result.round}/{rounds}", f"train {phase}", f"{len(result.cohort)} clients"]
    if not result.advanced:
        parts.append(f"no quorum in attempt {result.attempt + 1}; trying again")
    if result.loss is not None:
        parts.append(f"loss {result.loss:.3f}")
    if found := _metrics(result):
        parts.append(found)
    if result.aggregation_error is not None:
        parts.append(f"aggregation error {result.aggregation_error:.1e}")
    if result.rejected:
        parts.append(f"rejected {len(result.rejected)}: {_first(result.rejected.items())}")
    parts.append(f"sent {sent.up / 1e6:.2f} MB up, {sent.down / 1e6:.2f} MB down")
    parts.append(f"{clock(seconds_left)} left")
    return "   ".join(parts)


def _metrics(result: RoundResult) -> str:
    wanted = [name for name in result.metrics if name not in ("macro_f1", "matthews")]
    return "  ".join(f"{name} {result.metrics[name]:.3f}" for name in wanted)


def _first(items: Iterable[tuple[str, str]]) -> str:
    client, reason = next(iter(items))
    return f"{client} ({reason})"


def clock(seconds: float) -> str:
    """'12:05', or '1:12:05' where it is hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

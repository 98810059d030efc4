"""A run's rounds as lines of text, for a terminal, a log or another process."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from rolora.results.defence import MOSTLY
from rolora.run.runs import Run
from rolora.training.rounds import RoundResult


def described(rounds: Iterable[RoundResult], run: Run) -> Iterator[tuple[RoundResult, str]]:
    """Each round of ``run`` as it finishes, with a line about it.

    The line: phase, training loss, main metric, time left; then what went wrong, if anything did.
    Without that it has fewer than 80 characters. What was sent is in the table at the end.
    """
    total, metric = run.experiment.federation.rounds, run.experiment.federation.metric
    left = total - run.state.server.round
    done, started = 0, time.monotonic()
    for result in rounds:
        done += result.advanced and result.round > 0
        seconds = (time.monotonic() - started) / done * (left - done) if done else 0.0
        parts = [_where(result, total)]
        if result.loss is not None:
            parts.append(f"train loss {result.loss:.3f}")
        if metric in result.metrics:
            parts.append(f"{metric} {result.metrics[metric]:.3f}")
        if result.round:
            parts.append(f"{clock(seconds)} left")
        yield result, "  ".join([*parts, *_faults(result)])


def _where(result: RoundResult, rounds: int) -> str:
    if not result.round:
        return "before training"
    phase = "+".join(role for role in result.factors if role != "head") or "head"
    return f"round {result.round}/{rounds}  train {phase}"


def _faults(result: RoundResult) -> Iterator[str]:
    if not result.advanced:
        yield f"no quorum in attempt {result.attempt + 1} ({result.reason}); trying again"
    if result.moved is False:
        yield "NOTHING MOVED: no gradient reached a tensor of any client"
    if worst := [client for client, share in result.cut.items() if share > MOSTLY]:
        yield f"cut {len(worst)}: {', '.join(worst[:3])}{', ...' if len(worst) > 3 else ''}"
    for what, unused in (("rejected", result.rejected), ("no update of", result.missing)):
        for client, reason in list(unused.items())[:1]:
            yield f"{what} {len(unused)}: {client} ({reason})"


def clock(seconds: float) -> str:
    """'12:05', or '1:12:05' where it is hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

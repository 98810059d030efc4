"""A run's rounds as lines of text, for a terminal, a log or another process."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from rolora.algorithm.step import MOSTLY
from rolora.run.runs import Run
from rolora.training.rounds import RoundResult


def described(rounds: Iterable[RoundResult], run: Run) -> Iterator[tuple[RoundResult, str]]:
    """Each round of ``run`` as it finishes, with a line about it.

    The line: phase, cohort, training loss, metrics, aggregation error, whose update was mostly not
    used, bytes sent so far, time left.
    """
    total = run.experiment.federation.rounds
    left = total - run.state.server.round
    up, down, done, started = 0, 0, 0, time.monotonic()
    for result in rounds:
        up, down = up + result.bytes_up, down + result.bytes_down
        if result.round == 0:
            yield result, f"before training   {_metrics(result)}"
            continue
        done += result.advanced
        seconds = (time.monotonic() - started) / done * (left - done) if done else 0.0
        sent = f"sent {up / 1e6:.2f} MB up, {down / 1e6:.2f} MB down"
        yield result, "   ".join([*_parts(result, total), sent, f"{clock(seconds)} left"])


def _parts(result: RoundResult, rounds: int) -> Iterator[str]:
    phase = "+".join(role for role in result.factors if role != "head") or "head"
    yield from (f"round {result.round}/{rounds}", f"train {phase}", f"{len(result.cohort)} clients")
    if not result.advanced:
        yield f"no quorum in attempt {result.attempt + 1} ({result.reason}); trying again"
    if result.loss is not None:
        yield f"training loss {result.loss:.3f}"
    if result.moved is False:
        yield "NOTHING MOVED: no gradient reached a tensor of any client"
    if found := _metrics(result):
        yield found
    if result.aggregation_error is not None:
        yield f"aggregation error {result.aggregation_error:.1e}"
    if worst := [client for client, share in result.cut.items() if share > MOSTLY]:
        yield f"cut {len(worst)}: {', '.join(worst[:3])}{', ...' if len(worst) > 3 else ''}"
    if result.rejected:
        client, reason = next(iter(result.rejected.items()))
        yield f"rejected {len(result.rejected)}: {client} ({reason})"


def _metrics(result: RoundResult) -> str:
    wanted = [name for name in result.metrics if name not in ("macro_f1", "matthews")]
    return "  ".join(f"{name} {result.metrics[name]:.3f}" for name in wanted)


def clock(seconds: float) -> str:
    """'12:05', or '1:12:05' where it is hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

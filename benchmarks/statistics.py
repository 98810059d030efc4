"""Order of repetitions, medians, ratios and how sure they are. Pure functions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import median


def rotated(names: Sequence[str], repetition: int) -> list[str]:
    """The parties in the order of this repetition: A B C, then B C A, then C A B, ..."""
    start = repetition % len(names)
    return [*names[start:], *names[:start]]


def ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """The median of the paired ratios first / second; a pair is one repetition of both parties."""
    return median(first / second for first, second in pairs)


def interval(
    pairs: Sequence[tuple[float, float]], level: float = 0.95, draws: int = 4000
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``ratio``: whole pairs are drawn with replacement.

    Pairs, because what disturbs a repetition (another program, a slower clock) disturbs both.
    """
    rng = random.Random(0)
    ratios = [first / second for first, second in pairs]
    found = sorted(median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    tail = (1 - level) / 2
    return found[int(tail * draws)], found[min(draws - 1, int((1 - tail) * draws))]

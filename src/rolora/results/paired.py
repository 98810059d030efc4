"""One method's metric minus another's, seed by seed, with a confidence interval.

Runs of one seed share rows, shards, cohorts and batches, so most of what makes seeds differ is in
both numbers and falls out of their difference. The interval is Student's t over the differences:
mean ± t(0.975, n − 1) · sd / √n (Student 1908, "The probable error of a mean"). It takes the
differences for independent and about normal, which with a handful of seeds nothing can show.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass

from scipy.special import stdtrit

from rolora.results.ranking import Place, Ranking

CONFIDENCE = 0.95
LEAST_SEEDS = 3  # with two, t is 12.7: an interval that says nothing


@dataclass(frozen=True)
class Difference:
    """``method`` minus ``reference``: in each of ``seeds``, and the mean over them.

    ``interval`` holds the mean of all seeds there could be with probability ``CONFIDENCE``; None
    with fewer than ``LEAST_SEEDS`` seeds, or where a difference is not finite.
    """

    method: str
    reference: str
    seeds: tuple[int, ...]
    each: tuple[float, ...]
    mean: float
    interval: tuple[float, float] | None

    @property
    def decided(self) -> bool | None:
        """Whether the interval leaves out zero; None without an interval."""
        if self.interval is None:
            return None
        low, high = self.interval
        return low > 0 or high < 0


def difference(place: Place, reference: Place) -> Difference | None:
    """Over the seeds that both have exactly one run of; None if there is no such seed."""
    mine, theirs = _by_seed(place), _by_seed(reference)
    seeds = tuple(sorted(mine.keys() & theirs.keys()))
    if not seeds:
        return None
    each = tuple(mine[seed] - theirs[seed] for seed in seeds)
    mean = statistics.fmean(each)
    return Difference(place.method, reference.method, seeds, each, mean, interval(each))


def interval(differences: tuple[float, ...]) -> tuple[float, float] | None:
    """The confidence interval of their mean (see above)."""
    count = len(differences)
    if count < LEAST_SEEDS or not all(map(math.isfinite, differences)):
        return None
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(count)
    reach = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error
    return mean - reach, mean + reach


def differences(at: Ranking, reference: str) -> dict[str, Difference]:
    """Method -> its difference from ``reference``, for every other method that has a place."""
    against = at.place(reference)
    if against is None:
        return {}
    others = (place for place in (*at.places, *at.references) if place is not against)
    found = (difference(place, against) for place in others)
    return {one.method: one for one in found if one is not None}


def _by_seed(place: Place) -> dict[int, float]:
    counts = Counter(place.seeds)
    pairs = zip(place.seeds, place.values, strict=True)
    return {seed: value for seed, value in pairs if counts[seed] == 1}

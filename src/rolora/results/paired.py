"""The difference between two methods, paired by seed, with a confidence interval.

Runs of one seed share rows, shards, cohorts and batches, so most of the variation between seeds is
in both methods' numbers and cancels in their difference. The interval is that of the paired t-test:
mean ± t(0.975, n − 1) · sd / √n (Student 1908, "The probable error of a mean"). It assumes that the
differences are independent and roughly normal, which a handful of seeds cannot confirm.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rolora.results.ranking import Place, Ranking

CONFIDENCE = 0.95
MIN_SEEDS = 3  # with two seeds t is 12.7: the interval is too wide to be of use


@dataclass(frozen=True)
class Difference:
    """``method`` minus ``reference``: for each of ``seeds``, and the mean over them.

    ``interval`` is the confidence interval of the mean; None with fewer than ``MIN_SEEDS`` seeds,
    or if a difference is not finite.
    """

    method: str
    reference: str
    seeds: tuple[int, ...]
    each: tuple[float, ...]
    mean: float
    interval: tuple[float, float] | None

    @property
    def significant(self) -> bool | None:
        """Whether the interval excludes zero; None without an interval."""
        if self.interval is None:
            return None
        low, high = self.interval
        return low > 0 or high < 0


def difference(place: Place, reference: Place) -> Difference | None:
    """The difference over the seeds that both ran exactly once; None without such a seed."""
    ours, theirs = _by_seed(place), _by_seed(reference)
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    if not seeds:
        return None
    values = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
    each = tuple(a - b for a, b in zip(*values, strict=True))
    mean = statistics.fmean(each)
    return Difference(place.method, reference.method, seeds, each, mean, interval(*values))


def interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float] | None:
    """The confidence interval of the mean difference between paired values."""
    each = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(each) < MIN_SEEDS or not all(map(math.isfinite, each)):
        return None
    if min(each) == max(each):  # t is not defined without any spread
        return each[0], each[0]
    from scipy.stats import ttest_rel  # takes a second, and most runs are not compared

    with warnings.catch_warnings():
        # differences that are equal but for rounding give a correct, very narrow interval
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        low, high = ttest_rel(ours, theirs).confidence_interval(CONFIDENCE)
    return float(low), float(high)


def differences(ranking: Ranking, reference: str) -> dict[str, Difference]:
    """The difference of every other method of the ranking from ``reference``, by method."""
    places = {place.method: place for place in ranking.everyone}
    base = places.pop(reference, None)
    if base is None:
        return {}
    found = {method: difference(place, base) for method, place in places.items()}
    return {method: one for method, one in found.items() if one is not None}


def _by_seed(place: Place) -> dict[int, float]:
    counts = Counter(place.seeds)
    pairs = zip(place.seeds, place.values, strict=True)
    return {seed: value for seed, value in pairs if counts[seed] == 1}

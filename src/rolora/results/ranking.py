"""Methods ranked at an equal budget: of rounds, of bytes sent, or of rows trained on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rolora.results.runs import Point, RunRecord, by_method, gain, mean_sd

Axis = Literal["rounds", "megabytes", "rows"]
AXES: tuple[Axis, ...] = ("rounds", "megabytes", "rows")

Curves = Mapping[str, Sequence[tuple[int, Sequence[Point]]]]  # method -> (seed, curve) of each run


@dataclass(frozen=True)
class Place:
    """One method at the common budget.

    ``values`` holds the metric of the run of each of ``seeds``, in the same order; ``spent`` is the
    mean over these runs of what they had used by then, on every axis.
    """

    method: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    spent: Point

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return mean_sd(self.values)[0]

    @property
    def sd(self) -> float | None:
        """The sample standard deviation over the seeds; None for a single seed."""
        return mean_sd(self.values)[1]


@dataclass(frozen=True)
class Ranking:
    """Methods at an equal budget, best first.

    Each seed has its own budget: the most that all of its runs have reached. ``budget`` is the mean
    over seeds. If the methods ran on different seeds, the budget is the most that every run has
    reached. ``references`` are methods that send nothing (local training, centralized training):
    they are not ranked and have no place on the megabytes axis. ``late`` names methods whose first
    evaluation lies beyond the budget.
    """

    axis: Axis
    budget: float
    places: tuple[Place, ...]
    references: tuple[Place, ...]
    late: tuple[str, ...]

    @property
    def everyone(self) -> tuple[Place, ...]:
        """The ranked methods, then the references."""
        return self.places + self.references


def rankings(runs: Sequence[RunRecord], metric: str) -> list[Ranking]:
    """The ranking on every axis that has one; [] for no runs."""
    found = (rank_methods(runs, metric, axis) for axis in AXES)
    return [ranking for ranking in found if ranking is not None]


def rank_methods(runs: Sequence[RunRecord], metric: str, axis: Axis) -> Ranking | None:
    """The ranking at an equal budget on one axis; None if nothing was spent on it.

    Runs are ranked by ``RunRecord.scores``, interpolated linearly between two evaluated rounds.
    """
    groups = by_method(runs)
    silent = {m for m, own in groups.items() if not any(run.curve(metric)[-1].up for run in own)}
    curves: Curves = {
        method: [(run.seed, run.scores(metric)) for run in own]
        for method, own in groups.items()
        if axis != "megabytes" or method not in silent
    }
    budgets = _budgets(curves, axis)
    if not budgets or min(budgets.values()) == 0:
        return None
    places, late = [], []
    for method, own in curves.items():
        if any(_spent(curve[0], axis) > budgets[seed] for seed, curve in own):
            late.append(method)
            continue
        points = [_at_budget(curve, axis, budgets[seed]) for seed, curve in own]
        spent = Point(*map(statistics.fmean, zip(*points, strict=True)))
        seeds, values = tuple(seed for seed, _ in own), tuple(point.value for point in points)
        places.append(Place(method, seeds, values, spent))
    places.sort(key=lambda place: gain(metric, place.mean), reverse=True)
    return Ranking(
        axis,
        statistics.fmean(budgets.values()),
        tuple(place for place in places if place.method not in silent),
        tuple(place for place in places if place.method in silent),
        tuple(late),
    )


def _budgets(curves: Curves, axis: Axis) -> dict[int, float]:
    """The budget of each seed (see ``Ranking``)."""
    ends: dict[int, float] = {}
    for own in curves.values():
        for seed, curve in own:
            ends[seed] = min(ends.get(seed, math.inf), _spent(curve[-1], axis))
    if len({frozenset(seed for seed, _ in own) for own in curves.values()}) > 1:
        return dict.fromkeys(ends, min(ends.values()))
    return ends


def _spent(point: Point, axis: Axis) -> float:
    return {"rounds": point.round, "megabytes": point.up, "rows": point.rows}[axis]


def _at_budget(curve: Sequence[Point], axis: Axis, budget: float) -> Point:
    """The point of a curve, which begins before ``budget`` and ends after it, at the budget."""
    after = next(point for point in curve if _spent(point, axis) >= budget)
    before = next(point for point in reversed(curve) if _spent(point, axis) <= budget)
    if after.round <= before.round:
        return before
    share = (budget - _spent(before, axis)) / (_spent(after, axis) - _spent(before, axis))
    return Point(*(b + share * (a - b) for b, a in zip(before, after, strict=True)))
